"""`python -m rosa`, the same as the command `rosa`."""

from rosa.cli import main

if __name__ == "__main__":
    main()

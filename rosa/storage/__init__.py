"""Files and folders: written whole, read with care, owned by one process, told apart by what they hold."""

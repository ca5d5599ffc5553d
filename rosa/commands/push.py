"""`rosa push`: an adapter's folder to the Hugging Face hub, with a model card."""

from __future__ import annotations

from rosa.adapters.hub import check_target, push_folder
from rosa.commands import parser


def run(argv: list[str]) -> None:
    """Run `rosa push ...`."""
    options = parser(
        "push",
        "Upload an adapter's folder without its base: weights, configuration, tokenizer, the form of its prompts, and "
        "a model card with the figures of its run. `hf auth login` or HF_TOKEN says who you are.",
    )
    options.add_argument("adapter", metavar="ADAPTER", help="folder of an adapter, RoSA's, RoAd's or peft's")
    options.add_argument("repository", metavar="USER/NAME", help="on the hub; made if need be")
    options.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    options.add_argument("--revision", help="a branch, made if need be; default: main")
    options.add_argument(
        "--create-pr", "--create_pr", action="store_true", help="open a pull request in place of a commit"
    )
    options.add_argument("--message", help="of the commit; default: names the kind of adapter")
    args = options.parse_args(argv)
    if args.repository.count("/") != 1:
        options.error(f"argument USER/NAME: must be the name of a repository, user/name, got {args.repository}")
    if args.create_pr and args.revision is not None:
        options.error("argument --create-pr: not allowed with argument --revision, as it is for the main branch")
    check_target(args.repository, args.revision, args.create_pr)
    print(
        push_folder(
            args.adapter,
            args.repository,
            private=args.private,
            commit_message=args.message,
            revision=args.revision,
            create_pr=args.create_pr,
        )
    )

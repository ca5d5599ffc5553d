"""`rosa chat`: a conversation with an adapter in a terminal; in a pipe, one question and its answer."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import rosa
from rosa.commands import check_counts, check_texts, parser
from rosa.commands.adapters import ALONE, Chosen, add_model_options, choose, load
from rosa.data.prompt_form import CHAT, INSTRUCTION, PLAIN
from rosa.evaluation.conversation import Conversation
from rosa.evaluation.generation import check_text

HELP = """\
/reset         forget the conversation so far
/adapter NAME  switch to another of --adapters; without NAME, show them
/base          ask the last question again, of the base without its adapter
/help          show these lines
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""

ASKED = {
    INSTRUCTION: "It is asked in the paper's prompt, as it was trained: without history.",
    PLAIN: "What you write is continued as it stands, without history.",
}


def run(argv: list[str]) -> None:
    """Run `rosa chat ...`."""
    options = parser(
        "chat",
        "Talk to a model with its adapter. In a terminal /help shows what there is beside questions; in a pipe all of "
        "the input is one question, and the answer alone is printed.",
    )
    add_model_options(options, several="to switch between by /adapter NAME")
    options.add_argument("--system", help="what the system says first, to the chat template")
    options.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512, help="default: %(default)s")
    options.add_argument(
        "--temperature",
        type=float,
        help="of sampling, 0 for none; default: as the model's generation config has it, which mostly is none",
    )
    args = options.parse_args(argv)
    check_counts(options, args, "max_new_tokens")
    check_texts(options, args, "system")
    if args.temperature is not None and not (math.isfinite(args.temperature) and args.temperature >= 0):
        options.error(f"argument --temperature: must be a number from 0, got {args.temperature}")

    chosen = choose(options, args)
    if args.system is not None and not {*chosen.forms.values()} <= {CHAT}:
        raise ValueError("--system is for the chat template, by which this adapter's training rows were not written")
    by_hand = sys.stdin.isatty()
    question = "" if by_hand else _question()
    conversation = _conversation(chosen, args, quiet=not by_hand)
    if by_hand:
        _Terminal(conversation, chosen).run()
    else:
        conversation.ask(question, _say)
        print()


def _question() -> str:
    """All of the standard input."""
    try:
        question = sys.stdin.read().strip()
        check_text(question)
    except ValueError as error:
        raise ValueError(f"the standard input must be text in UTF-8: {error}") from error
    if not question:
        raise ValueError("there is no question on the standard input")
    return question


def _conversation(chosen: Chosen, args: argparse.Namespace, *, quiet: bool) -> Conversation:
    if quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
    model, tokenizer = load(chosen, args.dtype, args.load_in)
    form = next(iter(chosen.forms.values()), CHAT if tokenizer.chat_template else PLAIN)
    if not tokenizer.chat_template and (args.system is not None or CHAT in chosen.forms.values()):
        raise ValueError(f"the tokenizer of {chosen.base.name} has no chat template to ask by")
    if chosen.folders and ALONE not in chosen.folders:
        rosa.set_adapter(model, next(iter(chosen.folders)))  # the last one was loaded last
    return Conversation(
        model,
        tokenizer,
        form=form,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
    )


class _Terminal:
    """Questions and commands as they are typed. What is said of them goes to stderr where stdout is no terminal."""

    def __init__(self, conversation: Conversation, chosen: Chosen):
        self.conversation, self.chosen = conversation, chosen
        self.shown = sys.stdout.isatty()
        self.commands = {"/reset": self._reset, "/adapter": self._adapter, "/base": self._base, "/help": self._help}

    def run(self) -> None:
        """Until Ctrl-D or /quit."""
        with suppress(ImportError):  # of Windows
            import readline  # noqa: F401 (gives `input` a history and the arrow keys)
        names = [name for name in self.chosen.folders if name != ALONE]
        adapters = ", ".join(names) or ", ".join(map(str, self.chosen.folders.values())) or "none"
        self._tell(f"base     {self.chosen.base.name}\nadapter  {adapters}")
        self._tell_form()
        self._tell("/help shows the commands, Ctrl-D ends.")
        while True:
            try:
                text = input(">>> " if self.shown else "").strip()
            except EOFError:
                self._tell("")
                return
            except KeyboardInterrupt:
                self._tell("\nCtrl-D or /quit ends.")
                continue
            if text == "/quit":
                return
            if text:
                self._take(text)

    def _take(self, text: str) -> None:
        try:
            if not text.startswith("/"):
                self._answer(self.conversation.ask, text)
                return
            name, _, argument = text.partition(" ")
            command = self.commands.get(name)
            if command is None:
                raise ValueError(f"there is no command {name}: /help shows those there are")
            if argument.strip() and command != self._adapter:
                raise ValueError(f"{name} takes nothing after it, got {argument.strip()!r}: /help shows what it does")
            command(argument.strip())
        except ValueError as error:
            self._tell(f"{error}")

    def _answer(self, ask: Callable[..., None], *question: str) -> None:
        with _ctrl_c_told() as stopped:
            ask(*question, _say, stopped)
        print()

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self._tell("The conversation is forgotten.")

    def _adapter(self, name: str) -> None:
        names = [known for known in self.chosen.folders if known != ALONE]
        if not names:
            raise ValueError("there is nothing to switch: load several with --adapters a=FOLDER,b=FOLDER")
        model = self.conversation.model
        if name:
            if name not in names:
                raise ValueError(f"there is no adapter {name}, only {', '.join(names)}")
            rosa.set_adapter(model, name)
            self.conversation.form = self.chosen.forms[name]
            self._tell_form()
        active = rosa.active_adapter(model)
        self._tell("  ".join(f"[{known}]" if known == active else known for known in names))

    def _base(self, _: str) -> None:
        if not self.chosen.folders:
            raise ValueError("there is no adapter: this is the base")
        with _without_adapter(self.conversation.model):
            self._answer(self.conversation.ask_again)

    def _help(self, _: str) -> None:
        self._tell(HELP)

    def _tell_form(self) -> None:
        if self.conversation.form in ASKED:
            self._tell(ASKED[self.conversation.form])

    def _tell(self, text: str) -> None:
        print(text, file=sys.stdout if self.shown else sys.stderr)


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _without_adapter(model) -> AbstractContextManager:
    return rosa.disabled(model) if rosa.is_patched(model) else model.disable_adapter()


@contextmanager
def _ctrl_c_told() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C only makes true what is yielded, so that a forward pass ends where it can; a second one interrupts
    as ever."""
    pressed = []

    def press(number, frame) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)

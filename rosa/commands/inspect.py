"""`rosa inspect`: where a model's activations are among the rotary frequencies, how layer selection went, and what an
adapter does: RoSA's gains, RoAd's angles."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from rosa.adapters.config import RosaConfig
from rosa.adapters.disk import load_adapter
from rosa.adapters.folder import refuse_model_folder
from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.adapters.roae import RoAE
from rosa.commands import DTYPES, check_counts, parser
from rosa.data.conversation import check_chat_template
from rosa.data.files import read_text
from rosa.data.forms import DATA_FORMS
from rosa.data.prompt_form import CHAT
from rosa.data.rows import load_learnable
from rosa.data.tokens import sequences
from rosa.inspection import figures
from rosa.inspection.activations import (
    EnergyShare,
    energy_shares,
    id_batches,
    measure,
    token_batches,
    usable_r_lows,
)
from rosa.inspection.angles import draw_turns, read_turns, turns_table
from rosa.inspection.course import Course, read_course
from rosa.inspection.gains import draw_gains, gains_table, measure_gains
from rosa.storage.output import check_output

OF_MODEL = ("text", "data", "data_format", "limit", "r_low", "max_length", "batch_size", "dtype")


def run(argv: list[str]) -> None:
    """Run `rosa inspect ...`."""
    options = _options()
    args = options.parse_args(argv)
    check_counts(options, args, "limit", "max_length", "batch_size")
    check_output(args.output)
    refuse_model_folder(args.output)
    if args.model is None:
        _inspect_folder(options, args)
        return
    if args.text is None and args.data is None:
        options.error("one of the arguments --text --data is required with --model")
    for name in ("limit", "data_format"):
        if getattr(args, name) is not None and args.data is None:
            options.error(f"argument --{name.replace('_', '-')}: only with --data")
    _inspect_model(args)


def _inspect_folder(options: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What needs no model: a run, or an adapter alone."""
    if args.run is None and args.adapter is None:
        options.error("one of the arguments --model --run --adapter is required")
    of_others = OF_MODEL if args.run is None else ("adapter", *OF_MODEL)
    given = [name for name in of_others if getattr(args, name) != options.get_default(name)]
    if given:
        without = "without argument --model" if args.run is None else "with argument --run"
        options.error(f"argument --{given[0].replace('_', '-')}: not allowed {without}")
    if args.run is not None:
        _inspect_run(args.run, args.output)
    else:
        _inspect_adapter(args.adapter, args.output)


def _options() -> argparse.ArgumentParser:
    options = parser(
        "inspect",
        "Measure a model's rotated queries and keys by head dimension, layer and frequency, or show a run's layer "
        "selection, or how far a RoAd adapter turns and scales: pictures and the numbers behind them.",
    )
    subject = options.add_mutually_exclusive_group()
    subject.add_argument("--model", help="folder or Hub name of the model to measure")
    subject.add_argument("--run", type=Path, help="output folder of a training run")
    options.add_argument(
        "--adapter",
        help="folder of an adapter: with --model measured in it, of RoSA its gains too; alone, of RoAd, its angles",
    )
    options.add_argument("--output", type=Path, default=Path("inspection"), help="default: %(default)s")
    measuring = options.add_argument_group("with --model")
    text = measuring.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help="file of text to measure on")
    text.add_argument("--data", help="rows to measure on, prompts with responses: whatever `rosa train` takes")
    measuring.add_argument(
        "--data-format", "--data_format", choices=DATA_FORMS, help="of --data; default: by the columns of the first row"
    )
    measuring.add_argument("--limit", type=int, help="rows of --data, from the first; all if not given")
    measuring.add_argument("--r-low", "--r_low", type=float, help="a share of the rotary pairs, beside the usual ones")
    measuring.add_argument(
        "--max-length", "--max_length", default=2048, type=int, help="tokens in a piece; default: %(default)s"
    )
    measuring.add_argument("--batch-size", "--batch_size", default=8, type=int, help="default: %(default)s")
    measuring.add_argument("--dtype", default="auto", choices=DTYPES, help="of the model; default: as it was saved")
    return options


def _inspect_run(folder: Path, output: Path) -> None:
    course = read_course(folder)
    output.mkdir(parents=True, exist_ok=True)
    print(_counts_table(course))
    _draw(output, course, {"selections": figures.draw_course, "scores": figures.draw_scores})


def _inspect_adapter(source: str, output: Path) -> None:
    turns = read_turns(source)
    output.mkdir(parents=True, exist_ok=True)
    print(turns_table(turns))
    _draw(output, turns, {"angles": draw_turns})


def _inspect_model(args: argparse.Namespace) -> None:
    own = [] if args.r_low is None else [RosaConfig(r_low=args.r_low).r_low]
    batches = _batches(args)
    model = load_model(args.model, args.dtype)
    if args.adapter is not None:
        load_adapter(model, args.adapter)
    args.output.mkdir(parents=True, exist_ok=True)  # before the work of measuring
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    layers = measure(model, tqdm(batches, desc="measuring", unit="batch"))
    shares = energy_shares(layers, [*usable_r_lows(layers), *own])
    tokens = sum(batch["attention_mask"].sum().item() for batch in batches)
    print(f"{tokens:,} tokens, {len(layers)} layers with rotary attention\n")
    print(_shares_table(shares))
    _draw(args.output, layers, {"head_dimensions": figures.draw_head_dimensions, "layers": figures.draw_layers})
    _draw(args.output, shares, {"energy_share": figures.draw_energy_shares})
    if any(isinstance(module, RoAE) for module in model.modules()):
        gains = measure_gains(model, tqdm(batches, desc="measuring gains", unit="batch"))
        print(f"\n{gains_table(gains)}")
        _draw(args.output, gains, {"gains": draw_gains})


def _batches(args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """The text, or the rows as the tokens that training would see, whole, but for the EOS after a response: nothing
    follows from it."""
    sizes = {"max_length": args.max_length, "batch_size": args.batch_size}
    if args.text is not None:
        texts = [read_text(args.text)]
        return token_batches(load_tokenizer(args.model), texts, **sizes)
    form, rows, places = load_learnable(args.data, form=args.data_format, limit=args.limit)
    tokenizer = load_tokenizer(args.model)
    if form.prompts == CHAT:
        check_chat_template(tokenizer)
    end = None if form.prompts == CHAT else -1
    return id_batches([ids[:end] for ids, _ in sequences(rows, tokenizer, form.prompts, places)], **sizes)


def _shares_table(shares: Sequence[EnergyShare]) -> str:
    lines = [
        "share of energy in the last r_low of the rotary pairs, those of the lowest frequency",
        f"{'r_low':>6}{'evenly':>9}{'queries':>9}{'keys':>9}{'both':>9}   both, least and greatest layer",
    ]
    for together in (share for share in shares if share.layer is None):
        by_layer = [share for share in shares if share.r_low == together.r_low and share.layer is not None]
        least, greatest = (pick(by_layer, key=lambda share: share.both) for pick in (min, max))
        columns = "".join(map(_percent, (together.uniform, together.queries, together.keys, together.both)))
        ends = [f"{_percent(end.both)} (layer {end.layer})" for end in (least, greatest)]
        lines.append(f"{together.r_low:>6g}{columns} {''.join(ends)}")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return f"{'-' if share is None else f'{100 * share:.1f} %':>9}"


def _counts_table(course: Course) -> str:
    by_score = sum(made.exploited for made in course.history)
    lines = [
        f"{len(course.history)} selections in {course.steps} steps, {by_score} by score, "
        f"{len(course.history) - by_score} at random",
        f"{'layer':>6}{'by score':>10}{'at random':>11}{'chosen':>8}{'mean score':>13}",
    ]
    for place, (layer, (scored, random)) in enumerate(course.counts().items()):
        mean = sum(made.scores[place] for made in course.history) / len(course.history)
        lines.append(f"{layer:>6}{scored:>10}{random:>11}{scored + random:>8}{mean:>13.4g}")
    return "\n".join(lines)


def _draw(output: Path, subject: object, pictures: dict[str, Callable]) -> None:
    for name, draw in pictures.items():
        draw(subject, output / f"{name}.png")
        print(f"{output / name}.png, and the numbers in {name}.csv")

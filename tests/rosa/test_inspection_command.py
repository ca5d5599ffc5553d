"""`rosa inspect` on a tiny real model and a real run: what it prints and writes, and its errors."""

import csv
import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rosa
from rosa.cli import main
from rosa.data.tokens import sequences
from rosa.inspection.activations import energy_shares, id_batches, measure, token_batches

from .data.chat_templates import WITHOUT_MARKS
from .tiny_qwen2 import tiny_model, tiny_tokenizer

ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(8)]
TEXT = "\n".join(row["instruction"] + " " + row["output"] for row in ROWS)

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny base, an adapter for it, text, and data."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer([TEXT], vocab_size=300)
    tokenizer.chat_template = WITHOUT_MARKS
    tokenizer.save_pretrained(folder / "model")
    model = tiny_model(len(tokenizer), initializer_range=0.3)
    model.save_pretrained(folder / "model")
    rosa.patch(model, rosa.RosaConfig(rank=4, alpha=1.0))
    for name, parameter in model.named_parameters():
        if name.endswith("roae.up"):
            torch.nn.init.normal_(parameter)
    rosa.save_adapter(model, folder / "adapter")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The output folder of a run of `rosa train`."""
    output = tmp_path_factory.mktemp("run") / "output"
    arguments = ["--model", base / "model", "--data", base / "rows.json", "--output", output]
    more = "--max_steps 10 --save-steps 10 --dls_interval 2 --dls_p_exploit 0.5 --disable_tqdm true --rank 4"
    main(["train", *map(str, arguments), *more.split()])
    return output


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def measuring(base, *more):
    return ["inspect", "--model", str(base / "model"), *map(str, more)]


def shares_of(base, batches, r_lows, adapter=False):
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    if adapter:
        rosa.load_adapter(model, base / "adapter")
    return energy_shares(measure(model, batches), r_lows)


def trained_on(base, rows, form):
    """The tokens of rows as training sees them, without EOS."""
    made = sequences(rows, AutoTokenizer.from_pretrained(base / "model"), form)
    return [ids if form == "chat" else ids[:-1] for ids, _ in made]


def both(output):
    return [float(row["both"]) for row in table(output / "energy_share.csv")]


def test_a_model_is_measured_on_a_text(base, tmp_path, capsys):
    output = tmp_path / "a" / "b"
    main(measuring(base, "--text", base / "text.txt", "--output", output, "--r-low", 0.4, "--max-length", 64))
    names = [f"{name}.{kind}" for name in ("energy_share", "head_dimensions", "layers") for kind in ("csv", "png")]
    assert sorted(path.name for path in output.iterdir()) == names
    r_lows = [0.25, 0.4, 0.5, 0.75, 1.0]  # 0.1 leaves none of the 8 pairs
    batches = token_batches(AutoTokenizer.from_pretrained(base / "model"), [TEXT], max_length=64)
    expected = shares_of(base, batches, r_lows)
    assert both(output) == pytest.approx([share.both for share in expected])
    printed = capsys.readouterr().out
    tokens = len(AutoTokenizer.from_pretrained(base / "model")(TEXT)["input_ids"])
    assert f"{tokens:,} tokens, 2 layers" in printed
    together, *layers = expected[3:6]
    least, greatest = (pick(layers, key=lambda share: share.both) for pick in (min, max))
    line = next(line for line in printed.splitlines() if line.startswith("   0.4 "))
    numbers = [together.uniform, together.queries, together.keys, together.both, least.both, greatest.both]
    assert re.findall(r"[\d.]+(?= %)", line) == [f"{100 * number:.1f}" for number in numbers]
    assert re.findall(r"layer (\d)", line) == [str(least.layer), str(greatest.layer)]
    for name in ("energy_share", "head_dimensions", "layers"):
        assert f"{output / name}.png" in printed and f"{name}.csv" in printed


def test_with_an_adapter_and_rows_it_measures_their_prompts_and_responses(base, tmp_path):
    more = ["--data", base / "rows.json", "--limit", 3, "--adapter", base / "adapter", "--max-length", 64]
    main(measuring(base, *more, "--batch-size", 2, "--output", tmp_path / "out"))
    batches = id_batches(trained_on(base, ROWS[:3], "instruction"), max_length=64)
    expected, bare = (shares_of(base, batches, [0.25, 0.5, 0.75, 1.0], adapter) for adapter in (True, False))
    assert both(tmp_path / "out") == pytest.approx([share.both for share in expected], rel=1e-4)
    assert both(tmp_path / "out") != pytest.approx([share.both for share in bare], rel=1e-2)
    gains = table(tmp_path / "out" / "gains.csv")
    assert {row["layer"] for row in gains} == {"0", "1"} and any(float(row["mean"]) != 1 for row in gains)
    assert (tmp_path / "out" / "gains.png").exists()


TURNS = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "It is 1."}]


@pytest.mark.parametrize(
    ("row", "prompts", "learnt"),
    [
        ({"messages": TURNS}, "chat", {"messages": TURNS, "first": 0}),
        ({"prompt": "Say 1.", "completion": " It is 1."}, "plain", None),
        ({"text": "It is 1."}, "plain", {"prompt": "", "completion": "It is 1."}),
    ],
)
def test_rows_of_every_form_are_measured_as_they_are_trained_on(base, tmp_path, row, prompts, learnt):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    main(measuring(base, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out"))
    expected = shares_of(base, id_batches(trained_on(base, [learnt or row], prompts)), [0.25, 0.5, 0.75, 1.0])
    assert both(tmp_path / "out") == pytest.approx([share.both for share in expected])


def test_of_rows_that_may_be_read_in_two_ways_one_is_asked_for(base, tmp_path, error):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS[0], "messages": TURNS}))
    args = measuring(base, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out")
    assert "say which with --data_format" in error(args)
    main([*args, "--data_format", "instruction"])
    expected = shares_of(base, id_batches(trained_on(base, ROWS[:1], "instruction")), [0.25, 0.5, 0.75, 1.0])
    assert both(tmp_path / "out") == pytest.approx([share.both for share in expected])


def test_a_run_is_shown(finished, tmp_path, capsys):
    main(["inspect", "--run", str(finished), "--output", str(tmp_path / "out")])
    names = ["scores.csv", "scores.png", "selections.csv", "selections.png", "selections_counts.csv"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    printed = capsys.readouterr().out
    assert re.search(r"5 selections in 10 steps, \d by score, \d at random", printed)
    counts = table(tmp_path / "out" / "selections_counts.csv")
    assert sum(int(row["total"]) for row in counts) == 5  # one of two layers each time
    for row in counts:
        assert re.search(rf"^ +{row['layer']} +{row['by_score']} +{row['at_random']} +{row['total']} ", printed, re.M)
    assert f"{tmp_path / 'out' / 'selections'}.png" in printed


@pytest.fixture
def error(capsys):
    """Runs a command that must fail, and returns its one line on stderr."""

    def run(arguments, code=1):
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        told = capsys.readouterr().err
        assert exit.value.code == code
        assert "Traceback" not in told
        return told.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --model --run --adapter is required"),
        (["--model", "m", "--run", "r"], "argument --run: not allowed with argument --model"),
        (["--model", "m"], "one of the arguments --text --data is required with --model"),
        (["--model", "m", "--text", "t", "--data", "d"], "argument --data: not allowed with argument --text"),
        (["--model", "m", "--text", "t", "--limit", "3"], "argument --limit: only with --data"),
        (["--model", "m", "--text", "t", "--data-format", "text"], "argument --data-format: only with --data"),
        (["--model", "m", "--data", "d", "--limit", "0"], "argument --limit: must be at least 1, got 0"),
        (["--model", "m", "--text", "t", "--batch-size", "0"], "argument --batch-size: must be at least 1, got 0"),
        (["--run", "r", "--max-length", "3"], "argument --max-length: not allowed with argument --run"),
        (["--run", "r", "--adapter", "a"], "argument --adapter: not allowed with argument --run"),
    ],
)
def test_arguments_that_do_not_go_together_are_named(error, arguments, message):
    assert message in error(["inspect", *arguments], code=2)


def test_text_that_cannot_be_measured_is_named(base, tmp_path, error):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    latin.write_bytes("é".encode("latin-1"))
    assert f"{empty} is empty" in error(measuring(base, "--text", empty))
    assert f"{latin} is not UTF-8 text" in error(measuring(base, "--text", latin))
    assert "there is no file" in error(measuring(base, "--text", tmp_path / "none.txt"))
    assert "there is no file" in error(measuring(base, "--data", tmp_path / "none.json"))


def test_numbers_out_of_range_and_foreign_adapters_are_refused(base, tmp_path, error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ["--text", base / "text.txt"]
    assert "r_low must lie in (0, 1], got 1.5" in error(measuring(base, *text, "--r-low", 1.5))
    assert not list(tmp_path.iterdir())
    assert "r_low=0.05 leaves no pair" in error(measuring(base, *text, "--r-low", 0.05))
    assert "there is no adapter folder" in error(measuring(base, *text, "--adapter", tmp_path / "none"))
    assert "holds no complete adapter" in error(measuring(base, *text, "--adapter", base))


def test_a_model_that_rosa_cannot_patch_is_refused(base, tmp_path, error):
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(base / "model").save_pretrained(tmp_path / "gpt2")
    arguments = ["inspect", "--model", tmp_path / "gpt2", "--text", base / "text.txt", "--output", tmp_path / "out"]
    assert "GPT2LMHeadModel has no rotary attention" in error(arguments)


def test_a_folder_without_a_run_or_without_selections_is_named(tmp_path, error, finished):
    assert "there is no folder" in error(["inspect", "--run", tmp_path / "none"])
    assert "holds neither trainer_state.json nor a complete checkpoint" in error(["inspect", "--run", tmp_path])
    state = json.loads((finished / "checkpoint-10" / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if "loss" in entry]
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    output = tmp_path / "out"
    assert "logs no layer selection in 10 steps" in error(["inspect", "--run", tmp_path, "--output", output])
    assert not output.exists()


def test_an_output_that_is_a_file_is_told_before_the_model_is_loaded(base, tmp_path, error):
    (tmp_path / "file").write_text("")
    for output, fault in ((tmp_path / "file", "is not a folder"), (tmp_path / "file" / "out", "cannot be made, as")):
        arguments = ["--text", base / "text.txt", "--output", output]
        assert f"--output {output} {fault}" in error(["inspect", "--model", "no/such/model", *arguments])

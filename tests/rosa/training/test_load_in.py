"""`--load_in`: a base that bitsandbytes or torchao quantizes as it is loaded, trained on, asked and tested."""

import functools
import json
import sys
import weakref

import bitsandbytes
import pytest
import torch
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

import rosa
from rosa.adapters.folder import read_description
from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.cli import main
from rosa.data.prompts import prompt
from rosa.evaluation.generation import answer
from rosa.training.finetune import finetune
from rosa.training.methods import load_trained
from rosa.training.parsing import parse
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer

ROWS = [{"instruction": f"Add {i} and {i}.", "output": f"The sum is {2 * i}", "answer": str(2 * i)} for i in range(8)]
OF_BITSANDBYTES = {"4bit": bitsandbytes.nn.Linear4bit, "8bit": bitsandbytes.nn.Linear8bitLt}
OF_TORCHAO = {"4bit": IntxUnpackedToInt8Tensor, "8bit": Int8Tensor}

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base in 16 bits, the rows, and a task of them."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = tiny_tokenizer([row["instruction"] + row["output"] for row in ROWS], vocab_size=300)
    tiny_model(len(tokenizer), initializer_range=0.2).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "sums").mkdir()
    (folder / "sums" / "test.json").write_text(json.dumps(ROWS))
    (folder / "sums" / "task.json").write_text('{"answer": "number"}')
    return folder


def arguments(base, files, output, *more):
    steps = "--max_steps 2 --learning_rate 1e-2 --save_strategy no --rank 4"
    paths = ["--model", str(base), "--data", str(files / "rows.json"), "--output", str(output)]
    return [*paths, *(steps.removesuffix(" --rank 4") if "--method" in more else steps).split(), *map(str, more)]


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def q_proj(model):
    return next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))


def without(monkeypatch, *packages):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # which makes importing it fail


@pytest.mark.parametrize("load_in", OF_BITSANDBYTES)
def test_a_quantized_base_is_trained_asked_and_tested(files, tmp_path, load_in, capsys):
    base, output = files / "base", tmp_path / "output"
    trainer = finetune(*parse(arguments(base, files, output, "--load_in", load_in)))
    layer = q_proj(trainer.model)
    assert type(layer) is OF_BITSANDBYTES[load_in]
    plain = rosa.patch(load_model(base), rosa.RosaConfig(rank=4))
    assert rosa.count_parameters(trainer.model) == rosa.count_parameters(plain)
    if load_in == "4bit":
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)
    of_both = ["--model", str(base), "--adapter", str(output), "--max-new-tokens", "6"]
    test = ["evaluate", *of_both, "--tasks", "sums", "--data-dir", str(files), "--output", str(tmp_path / "found")]
    main([*test, "--load-in", load_in])
    lines = (tmp_path / "found" / "predictions" / "sums.jsonl").read_text().splitlines()
    # As the very model says it that was trained.
    prompts = [prompt(row["instruction"]) for row in ROWS]
    expected = answer(trainer.model.eval(), load_tokenizer(base), prompts, max_new_tokens=6)
    assert [json.loads(line)["prediction"] for line in lines] == expected
    capsys.readouterr()
    main(["generate", *of_both, "--instruction", ROWS[0]["instruction"], "--load-in", load_in])
    assert capsys.readouterr().out == expected[0] + "\n"
    with pytest.raises(SystemExit):
        main(test)  # which does not go on from predictions of another base
    assert f"load_in was {load_in}, now None" in capsys.readouterr().err


@pytest.mark.parametrize("load_in", OF_BITSANDBYTES)
def test_in_8_bits_the_inputs_of_the_mlp_stay_until_backward_and_in_4_bits_they_do_not(files, load_in):
    """Of which docs/quantized.md tells, and `benchmarks.quantized` counts the bytes."""
    model = rosa.patch(load_model(files / "base", load_in=load_in), rosa.RosaConfig(rank=4)).train()
    inputs = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        keep = functools.partial(lambda name, _, args: inputs.update({name: weakref.ref(args[0])}), name)
        model.model.layers[0].mlp.get_submodule(name).register_forward_pre_hook(keep)
    ids = torch.arange(12)[None]
    loss = model(input_ids=ids, labels=ids).loss
    kept = [name for name, reference in inputs.items() if reference() is not None]
    assert len(inputs) == 3 and kept == (list(inputs) if load_in == "8bit" else [])
    loss.backward()


@pytest.mark.parametrize("method", ["rosa", "lora"])
def test_the_adapter_fits_the_base_as_it_was_saved_too(files, tmp_path, method):
    base = files / "base"
    for name, more in (("quantized", ["--load_in", "4bit"]), ("plain", [])):
        finetune(*parse(arguments(base, files, tmp_path / name, "--method", method, *more)))
    model = load_trained(load_model(base), tmp_path / "quantized")
    assert type(q_proj(model)) is not OF_BITSANDBYTES["4bit"]
    assert weights(tmp_path / "quantized") != weights(tmp_path / "plain")
    if method == "rosa":
        assert read_description(tmp_path / "quantized") == read_description(tmp_path / "plain")


@pytest.mark.parametrize("load_in", OF_TORCHAO)
def test_torchao_takes_the_place_of_bitsandbytes_where_that_is_missing(files, tmp_path, load_in, monkeypatch):
    without(monkeypatch, "bitsandbytes")
    trainer = finetune(*parse(arguments(files / "base", files, tmp_path, "--load_in", load_in)))
    assert type(q_proj(trainer.model).weight) is OF_TORCHAO[load_in]
    assert rosa.load_adapter(load_model(files / "base", load_in=load_in), tmp_path) is not None


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_without_a_package_that_quantizes_nothing_is_loaded(files, tmp_path, command, monkeypatch, capsys):
    (tmp_path / "base").mkdir()
    for file in (files / "base").glob("*.json"):
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())  # all but the weights
    without(monkeypatch, "bitsandbytes", "torchao")
    options = {
        "train": arguments(tmp_path / "base", tmp_path, tmp_path / "output"),  # where there are no rows either
        "generate": ["--model", str(tmp_path / "base"), "--prompt", "p"],
        "evaluate": ["--model", str(tmp_path / "base"), "--tasks", "sums", "--data-dir", str(files)],
    }[command]
    with pytest.raises(SystemExit):
        main([command, *options, "--load_in", "8bit"])
    told = capsys.readouterr().err
    assert f"rosa {command}: error: load_in 8bit needs a package that quantizes, and neither bitsandbytes" in told
    assert told.endswith("imported: pip install '.[quant]' in RoSA's folder\n") and not (tmp_path / "output").exists()


def test_a_base_that_was_saved_quantized_trains_as_it_is_and_is_not_quantized_again(files, tmp_path):
    load_model(files / "base", load_in="4bit").save_pretrained(tmp_path / "base")
    load_tokenizer(files / "base").save_pretrained(tmp_path / "base")
    job = arguments(tmp_path / "base", files, tmp_path / "output")
    with pytest.raises(ValueError, match="base was saved quantized .*bitsandbytes.* load_in 8bit has nothing to do"):
        finetune(*parse([*job, "--load_in", "8bit"]))
    trainer = finetune(*parse(job))
    assert type(q_proj(trainer.model)) is OF_BITSANDBYTES["4bit"]


def test_another_word_is_told(files):
    with pytest.raises(ValueError, match="load_in must be one of 4bit, 8bit, got '2bit'"):
        load_model(files / "base", load_in="2bit")

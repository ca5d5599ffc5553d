"""An adapter's folder: what others make of it, what may stand in it, links, and files that are damaged."""

import json
import os
import random
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import rosa
from rosa.adapters.folder import has_adapter, is_peft, read_description, refuse_model_folder, remove_adapter
from tests.rosa.tiny_qwen2 import tiny_tokenizer

WEIGHTS, CONFIG, OLD_CONFIG, NOTE = (
    "adapter_model.safetensors",
    "rosa_config.json",
    "adapter_config.json",
    "config.json",
)


@pytest.fixture
def saved(make_patched, tmp_path):
    rosa.save_adapter(make_patched(), tmp_path / "out")
    return tmp_path / "out"


def as_once_written(folder):
    """The folder as RoSA wrote it when its configuration had peft's name."""
    (folder / NOTE).unlink()
    (folder / CONFIG).rename(folder / OLD_CONFIG)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SAYS = r"RoSA adapter, not a model: load its base with from_pretrained, then rosa.load_adapter\(base, folder\)"


@pytest.mark.parametrize("with_peft", [True, False])
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel, AutoConfig])
def test_from_pretrained_of_an_adapter_says_what_to_do(saved, kind, with_peft, monkeypatch):
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: with_peft)
    with pytest.raises(ValueError, match=SAYS):
        kind.from_pretrained(saved)


def test_a_tokenizer_beside_the_adapter_loads_without_a_word(saved, capfd):
    tokenizer = tiny_tokenizer(["to and fro"], vocab_size=300)
    tokenizer.save_pretrained(saved)
    capfd.readouterr()
    loaded = AutoTokenizer.from_pretrained(saved)
    assert loaded("to and fro").input_ids == tokenizer("to and fro").input_ids
    assert "RoSA" not in "".join(capfd.readouterr())


def test_an_older_folder_loads_without_a_warning_and_is_brought_up_to_date(saved, make_model, make_patched, batch):
    folder = as_once_written(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = rosa.load_adapter(make_model().eval(), folder)
    assert torch.equal(model(**batch).logits, make_patched().eval()(**batch).logits)
    assert has_adapter(folder) and not is_peft(folder) and read_description(folder)["config"]["rank"] == 4
    rosa.save_adapter(model, folder)
    assert set(os.listdir(folder)) == {"README.md", NOTE, CONFIG, WEIGHTS}


def test_a_folder_with_a_model_is_refused_and_stays_as_it_is(make_model, make_patched, tmp_path):
    make_model().save_pretrained(tmp_path / "whole")
    make_model().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name, file in (("index", "model.safetensors.index.json"), ("bin", "pytorch_model-00001-of-00002.bin")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"{}")
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "whole" / NOTE, tmp_path / "config")
    for name in ("whole", "shards", "index", "bin", "config"):
        before = contents(tmp_path / name)
        for call in (lambda folder: rosa.save_adapter(make_patched(), folder), refuse_model_folder):
            with pytest.raises(ValueError, match=rf"{name} holds a model \(.*\): choose another folder"):
                call(tmp_path / name)
        assert contents(tmp_path / name) == before


def test_a_folder_with_an_adapter_a_tokenizer_and_checkpoints_is_not_refused(saved, make_model, make_patched):
    tiny_tokenizer(["to and fro"], vocab_size=300).save_pretrained(saved)
    make_model().save_pretrained(saved / "checkpoint-3")
    refuse_model_folder(saved)
    refuse_model_folder(saved / "nowhere")
    rosa.save_adapter(make_patched(), saved)


def test_a_config_json_of_another_program_stays(make_patched, tmp_path):
    for own in (b'{"lr": 1}', b"[1]", b"\xff"):
        (tmp_path / NOTE).write_bytes(own)
        rosa.save_adapter(make_patched(), tmp_path)
        remove_adapter(tmp_path)
        assert contents(tmp_path).keys() == {NOTE, "README.md"} and (tmp_path / NOTE).read_bytes() == own


def test_an_adapter_is_removed_whole(saved, make_model, tmp_path):
    remove_adapter(saved)
    assert os.listdir(saved) == ["README.md"] and not has_adapter(saved)
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert has_adapter(tmp_path / "lora")
    remove_adapter(tmp_path / "lora")
    assert not has_adapter(tmp_path / "lora")
    remove_adapter(tmp_path / "nowhere")


def test_links_are_not_written_through(make_patched, tmp_path):
    folder, others = tmp_path / "out", tmp_path / "others"
    folder.mkdir(), others.mkdir()
    names = ["README.md", NOTE, CONFIG, WEIGHTS]
    for name in (*names, *(f"{name}.tmp" for name in (*names, OLD_CONFIG))):
        (folder / name).symlink_to(others / name)
    for name in names[2:]:
        (others / name).write_text("mine")
    before = contents(others)
    rosa.save_adapter(make_patched(), folder)
    assert contents(others) == before and not any((folder / name).is_symlink() for name in names)


@pytest.mark.parametrize("first", ["RoSA", "peft"])
def test_who_an_adapter_is_of_is_told_though_one_replaced_the_other(saved, make_model, make_patched, first):
    lora = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert not is_peft(saved)
    lora.save_pretrained(saved)
    assert is_peft(saved) and read_description(saved)["peft_type"] == "LORA"
    if first == "peft":
        rosa.save_adapter(make_patched(), saved)
        assert not is_peft(saved) and read_description(saved)["adapter_type"] == "rosa"
        rosa.load_adapter(make_model(), saved)
        with pytest.raises(ValueError, match=f"Can't find '{OLD_CONFIG}'"):
            PeftModel.from_pretrained(make_model(), saved)


def fingerprint(model):
    parameters = {name: (p.detach().clone(), p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    return parameters, hooks, torch.get_rng_state()


def same(a, b):
    values = a[0].keys() == b[0].keys() and all(torch.equal(a[0][n][0], b[0][n][0]) for n in a[0])
    flags = values and all(a[0][n][1:] == b[0][n][1:] for n in a[0])
    return flags and a[1] == b[1] and torch.equal(a[2], b[2])


def tried(model, folder):
    """Loads what may be damaged, and gives the error; whatever comes of it, the model is then as before."""
    before = fingerprint(model)
    error = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rosa.load_adapter(model, folder)
        rosa.unpatch(model)
    except (rosa.AdapterError, FileNotFoundError) as raised:
        error = str(raised)
        assert "\n" not in error
    assert same(fingerprint(model), before)
    return error


NESTED = "[" * 100_000
HOSTILE = ["5", "null", "true", '"text"', "[]", "{}", "", NESTED, "NaN", '{"a": ' * 100_000, '{"base": {}}']


@pytest.mark.parametrize("content", [*(text.encode() for text in HOSTILE), b"\xff\xfe\x00", b"\x80"], ids=range(13))
def test_a_damaged_copy_of_the_configuration_is_not_needed(saved, make_model, content):
    for name in (CONFIG, OLD_CONFIG):
        (saved / CONFIG).unlink(missing_ok=True)
        (saved / name).write_bytes(content)
        with pytest.warns(UserWarning, match=f"{name} differs from the configuration stored with the weights"):
            rosa.load_adapter(make_model(), saved)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_configuration_of_the_weights_is_told_in_a_line(saved, make_model, text):
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors, saved / WEIGHTS, metadata={"adapter_config": text})
    assert f"{WEIGHTS} carries " in tried(make_model(), saved) or text == '{"base": {}}'


NUMBERS = ["1e400", "-1e999", "1e39", str(10**400), "9" * 5000, "NaN", "true", "null", '"a\\nb"', "[]", "{}", "[1e400]"]


@pytest.fixture
def small(make_model, stir, tmp_path):
    """A model of one layer, and a folder with an adapter for it."""
    model = make_model(num_hidden_layers=1)
    rosa.save_adapter(stir(rosa.patch(model, rosa.RosaConfig(rank=4))), tmp_path / "small")
    return rosa.unpatch(model), tmp_path / "small"


def test_hostile_numbers_of_the_configuration_are_told_in_a_line(small):
    """Every field of the description, with every such value: whatever loads is a whole adapter."""
    model, saved = small
    tensors = load_file(saved / WEIGHTS)
    with safe_open(saved / WEIGHTS, framework="pt") as file:
        description = json.loads(file.metadata()["adapter_config"])
    places = [(field,) for field in description] + [(p, f) for p in ("config", "base") for f in description[p]]
    errors = 0
    for place in places:
        for number in NUMBERS:
            edited = json.loads(json.dumps(description))
            (edited if len(place) == 1 else edited[place[0]])[place[-1]] = "HERE"
            text = json.dumps(edited).replace('"HERE"', number)
            save_file(tensors, saved / WEIGHTS, metadata={"adapter_config": text})
            errors += tried(model, saved) is not None
    assert errors > 0.8 * len(places) * len(NUMBERS)


def test_damaged_bytes_are_told_in_a_line(small):
    model, saved = small
    whole, draw = (saved / WEIGHTS).read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    errors = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(header if draw.random() < 0.9 else len(whole))
            damaged[at] = draw.choice((draw.randrange(256), ord(draw.choice('0123456789[]{}",:-.eE\\'))))
        if draw.random() < 0.2:
            del damaged[draw.randrange(len(whole)) :]
        (saved / WEIGHTS).write_bytes(damaged)
        errors += tried(model, saved) is not None
    assert errors > 100

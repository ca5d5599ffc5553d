"""rosa.load: the base, the tokenizer and the adapter, found by the adapter's own files."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import rosa
from rosa.adapters.base import Base, find_base
from rosa.adapters.folder import read_description
from rosa.adapters.pretrained import load_model
from rosa.data.prompt_form import CHAT, FORMS, save_form
from rosa.data.prompts import question_ids
from rosa.training.methods import attach
from tests.rosa.tiny_qwen2 import TAUGHT, taught_to_chat, tiny_model, tiny_tokenizer

EXAMPLES = Path(__file__).parents[3] / "examples"
IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "base"
    tokenizer = tiny_tokenizer(["one two three"], vocab_size=300)
    tokenizer.save_pretrained(folder)
    tiny_model(len(tokenizer), initializer_range=0.3).save_pretrained(folder)
    return folder


def opened(base):
    return type(tiny_model(8)).from_pretrained(base).eval()


def stirred(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(kind, base, folder):
    """Saves an adapter of the base, and returns the model that carries it."""
    if kind == "lora":
        model = stirred(peft.get_peft_model(opened(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))).eval()
        model.save_pretrained(folder)
        return model
    model = stirred(rosa.patch(opened(base), {"rosa": rosa.RosaConfig(rank=4), "road": rosa.RoadConfig()}[kind]))
    rosa.save_adapter(model, folder)
    return model


@pytest.mark.parametrize("kind", ["rosa", "road", "lora"])
def test_an_adapter_is_loaded_on_the_base_that_it_names(kind, base, tmp_path):
    expected = saved(kind, base, tmp_path / "out")
    model, tokenizer = rosa.load(tmp_path / "out")
    assert not model.training and not any(module.training for module in model.modules())
    assert torch.equal(model(IDS).logits.cpu(), expected(IDS).logits)
    assert not torch.equal(model(IDS).logits.cpu(), opened(base)(IDS).logits)
    assert tokenizer("one")["input_ids"]


def test_options_reach_the_base(base, tmp_path):
    saved("road", base, tmp_path)
    model, _ = rosa.load(tmp_path, dtype=torch.float64, attn_implementation="eager", device_map={"": "cpu"})
    assert model.dtype == torch.float64 and model.config._attn_implementation == "eager"
    assert model.device.type == "cpu"


def test_the_adapters_own_tokenizer_counts_more_than_the_bases(base, tmp_path):
    saved("road", base, tmp_path)
    assert rosa.load(tmp_path)[1].chat_template is None
    own = tiny_tokenizer(["one two three"], vocab_size=300)
    own.chat_template = "{{ messages }}"
    own.save_pretrained(tmp_path)
    assert rosa.load(tmp_path)[1].chat_template == "{{ messages }}"


def test_a_base_that_has_moved_is_named_by_the_error_and_given_by_base(base, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    expected = saved("road", moved, tmp_path / "out")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"no folder {moved} to load.*out names this base: give the base"):
        rosa.load(tmp_path / "out")
    model, _ = rosa.load(tmp_path / "out", base=tmp_path / "elsewhere")
    assert torch.equal(model(IDS).logits.cpu(), expected(IDS).logits)
    with pytest.raises(FileNotFoundError, match="there is no folder /nowhere/at/all") as error:
        rosa.load(tmp_path / "out", base="/nowhere/at/all")
    assert "names this base" not in str(error.value)


@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLM.from_pretrained])
def test_a_base_by_a_relative_path_is_found_from_elsewhere(load, base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    rosa.save_adapter(rosa.patch(load(base.name), rosa.RoadConfig()), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert read_description(tmp_path / "out")["base_model_name_or_path"] == str(base)
    model, _ = rosa.load("out")
    assert torch.equal(model(IDS).logits.cpu(), load_model(base)(IDS).logits)


def test_so_is_the_base_of_an_adapter_of_pefts(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    attach(load_model(base.name), "lora").save_pretrained(tmp_path / "out")
    assert read_description(tmp_path / "out")["base_model_name_or_path"] == str(base)


def test_an_adapter_that_names_no_base_wants_one(base, tmp_path):
    model = tiny_model(len(tiny_tokenizer(["one two three"], vocab_size=300)))
    rosa.save_adapter(rosa.patch(model, rosa.RoadConfig()), tmp_path)
    with pytest.raises(ValueError, match="does not say what base it was made for: give the base, with base= in Python"):
        rosa.load(tmp_path)
    assert rosa.active_adapter(rosa.load(tmp_path, base=base)[0]) == "default"


def test_what_is_no_adapter_is_told(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no adapter folder nowhere"):
        rosa.load("nowhere")
    with pytest.raises(FileNotFoundError, match="holds no complete adapter"):
        rosa.load(base)


def test_the_commit_of_a_base_on_the_hub_is_kept_and_found_again(base, tmp_path):
    model = opened(base)
    model.config.name_or_path, model.config._commit_hash = "user/base", "abc123"
    rosa.patch(model, rosa.RoadConfig(pairing=2))
    for as_peft in (False, True):
        rosa.save_adapter(model, tmp_path, as_peft=as_peft)
        assert find_base({tmp_path: read_description(tmp_path)}) == Base("user/base", "abc123")
    old = {"base_model_name_or_path": "user/base"}  # from before it was kept
    assert find_base({tmp_path: old}) == Base("user/base")
    with pytest.raises(ValueError, match="out names user/base; two names user/other"):
        find_base({"out": old, "two": {"base_model_name_or_path": "user/other"}})
    with pytest.raises(ValueError, match="out names user/base; two names user/base at abc123"):
        find_base({"out": old, "two": old | {"revision": "abc123"}})


def test_a_composition_is_loaded_with_no_task_chosen(base, tmp_path):
    model = stirred(rosa.compose(opened(base), tasks=("form", "skill"), layers=1))
    rosa.save_composition(model, tmp_path)
    found, tokenizer = rosa.load(tmp_path)
    assert rosa.is_composed(found) and tokenizer("one")["input_ids"]
    assert torch.equal(found(IDS).logits.cpu(), opened(base)(IDS).logits)
    with rosa.use_tasks(found, "form"), rosa.use_tasks(model, "form"):
        assert torch.equal(found(IDS).logits.cpu(), model(IDS).logits)
    description = json.loads((tmp_path / "composition.json").read_text())
    assert description["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_loaded_goes_into_a_pipeline_as_it_is(form, base, tmp_path, monkeypatch, capsys):
    expected = saved("road", base, tmp_path)
    tokenizer = rosa.load(tmp_path)[1]
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(tmp_path)
    save_form(tmp_path, form)
    ids = torch.tensor([question_ids(form, tokenizer, "one two")])
    new = expected.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    run_pipeline(monkeypatch, tmp_path, "one two")
    assert capsys.readouterr().out == tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_a_pipeline_ends_where_a_turn_was_learnt_to_end(tmp_path, monkeypatch, capsys):
    model, tokenizer = taught_to_chat()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    rosa.save_adapter(rosa.patch(opened(tmp_path / "base"), rosa.RoadConfig()), tmp_path / "out")
    save_form(tmp_path / "out", CHAT)
    asked, expected = TAUGHT[0]
    run_pipeline(monkeypatch, tmp_path / "out", asked)
    assert capsys.readouterr().out == f"{expected}\n"


def run_pipeline(monkeypatch, adapter, asked):
    arguments = ["--adapter", str(adapter), "--instruction", asked, "--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *arguments])
    runpy.run_path(str(EXAMPLES / "pipeline.py"), run_name="__main__")

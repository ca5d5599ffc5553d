"""`save_pretrained` of patched models: their adapter, in transformers' hands and in others'."""

import copy
import os

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import rosa
from rosa.adapters.pretrained import load_model

FILES = ["README.md", "adapter_model.safetensors", "config.json", "rosa_config.json"]


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.fixture
def based(make_model, stir, tmp_path):
    """A base in a folder, and a patched model of it."""
    make_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return tmp_path / "base", stir(rosa.patch(model, rosa.RosaConfig(rank=4)))


@pytest.mark.parametrize("kind", ["itself", "a deep copy"])
def test_save_pretrained_of_a_patched_model_saves_the_adapter(based, make_model, batch, tmp_path, kind):
    model = based[1] if kind == "itself" else copy.deepcopy(based[1])
    model.save_pretrained(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    assert torch.equal(logits(rosa.load_adapter(make_model(), tmp_path / "out"), batch), logits(model, batch))
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="base holds a model"):
        model.save_pretrained(based[0])


def test_inside_disabled_and_after_unpatch_it_saves_the_base(based, make_model, batch, tmp_path):
    base, model = logits(make_model(), batch), based[1]
    with rosa.disabled(model):
        model.save_pretrained(tmp_path / "inside")
    rosa.unpatch(model).save_pretrained(tmp_path / "after")
    for name in ("inside", "after"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(loaded, batch), base) and "rosa_config.json" not in os.listdir(tmp_path / name)


def test_what_would_lose_something_is_refused_with_what_to_write(based, make_patched, tmp_path):
    model, out = based[1], tmp_path / "out"
    with pytest.raises(ValueError, match=r"rosa.push_to_hub\(model, repo_id\)"):
        model.save_pretrained(out, push_to_hub=True)
    with pytest.raises(ValueError, match="this Qwen2Model has layers of a Qwen2ForCausalLM that rosa.patch"):
        model.model.save_pretrained(out)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"an adapter of PEFT's and one of RoSA's.*rosa.save_adapter\(model, folder\)"):
        model.save_pretrained(out)
    assert not out.exists()
    with rosa.disabled(model):
        model.save_pretrained(out)
    assert "adapter_config.json" in os.listdir(out)


def test_transformers_trainer_saves_checkpoints_of_the_adapter(based, make_model, batch, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=2, save_steps=2, report_to=[], use_cpu=True)
    trainer = Trainer(based[1], arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        assert torch.equal(logits(rosa.load_adapter(make_model(), folder), batch), logits(based[1], batch))


def test_accelerates_way_of_saving_saves_the_adapter(based, make_model, batch, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(based[1])
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path / "out",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    assert torch.equal(logits(rosa.load_adapter(make_model(), tmp_path / "out"), batch), logits(based[1], batch))


def test_what_save_pretrained_once_wrote_of_a_patched_model_is_no_base(based, tmp_path):
    write = type(based[1]).save_pretrained.__wrapped__
    for name, sizes in (("whole", {}), ("shards", {"max_shard_size": "20KB"})):
        write(based[1], tmp_path / name, **sizes)
        with pytest.raises(ValueError, match=r"written by save_pretrained of a model that RoSA had patched \(model"):
            load_model(tmp_path / name)
    load_model(based[0])

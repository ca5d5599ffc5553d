"""Layer selection under DeepSpeed's ZeRO: two processes take the course of one, whatever the stage."""

import importlib.util
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rosa
from rosa.adapters.folder import WEIGHTS_NAME
from tests.rosa.conftest import make_model
from tests.scale.zero_finetune import make_trainer
from tests.scale.zero_worker import INTERVAL, LEARNING, STEPS, build, rows, trained

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")

CLIPPED = dict(clip=0.02, accumulate=2, dls={})
JOBS = {
    "zero1": dict(stage=1, steps=26, **CLIPPED),
    "zero2": dict(stage=2, steps=26, **CLIPPED),
    "zero3": dict(stage=3, steps=26, **CLIPPED),
    "zero1-mask": dict(stage=1, dls={"mode": "mask"}, clip=0.02, accumulate=2),
    "zero2-mask": dict(stage=2, dls={"mode": "mask"}, clip=0.02),
    # Param groups in several parts, every parameter partitioned, gradients reduced in many buckets.
    "zero3-mask": dict(
        stage=3, dls={"mode": "mask"}, clip=0.02,
        zero={"sub_group_size": 50, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 500},
    ),
    "zero2-offload": dict(stage=2, dls={}, zero={"offload_optimizer": {"device": "cpu"}}),
    "zero2-lora": dict(stage=2, dls={}, model={"lora": True}),
    "zero2-road": dict(stage=2, dls={}, model={"road": True}),
    "zero1-bf16": dict(stage=1, dls={}, bf16=True, data_types={"grad_accum_dtype": "fp32"}),  # BF16_Optimizer
    "zero2-bf16": dict(stage=2, dls={}, bf16=True),
    "zero3-bf16": dict(stage=3, dls={}, bf16=True),
    "no-zero": dict(stage=0, dls={}, clip=0.02, accumulate=2),
    # A checkpoint of DeepSpeed's own between two selections.
    "zero1-resumed": dict(stage=1, stop=10, dls={}),
    "zero2-resumed": dict(stage=2, stop=10, dls={}),
    "zero3-resumed": dict(stage=3, stop=10, dls={}),
    # What is refused, and what goes without layer selection.
    "one-group": dict(stage=2, dls={}, labelled=False),
    "adapter-score": dict(stage=2, dls={"score": "adapter"}),
    "zero3-lora": dict(stage=3, dls={}, model={"lora": True}),
    "no-zero-bf16": dict(stage=0, dls={}, bf16=True),
    "no-dls": dict(stage=3, labelled=False),
}  # fmt: skip
REFUSED = {
    "no-zero-bf16": "ValueError: something other than DeepSpeed's ZeRO 1 to 3 has put tensors",
    "one-group": "ValueError: DeepSpeed's ZeRO makes one tensor of a param group.*rosa.layer_groups",
    "adapter-score": "ValueError: under DeepSpeed's ZeRO layers are ranked by score='norms', got 'adapter'",
    "zero3-lora": "ValueError: under ZeRO-3 gradients are reduced of what trains",
}
IN_BF16 = [name for name in JOBS if JOBS[name].get("bf16")]


@pytest.fixture(scope="module")
def ran(launch, tmp_path_factory):
    """The two ranks' results of every job."""
    folder = tmp_path_factory.mktemp("zero")
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    status, output = launch("torchrun", "zero_worker.py", folder)
    assert status == 0, output[-4000:]
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)] for name in JOBS}


def alone(*, steps=STEPS, clip=0.0, dls=None, model=None):
    """What one process makes of a job's global batches."""
    inner = build(**(model or {}))
    optimizer = torch.optim.AdamW(rosa.trainable_parameters(inner), **LEARNING)
    if dls is not None:
        optimizer = rosa.DynamicLayerSelection(optimizer, inner, **{"interval": INTERVAL} | dls)
    for step in range(steps):
        inner(input_ids=rows(step), labels=rows(step)).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(inner.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in trained(inner).items()}, getattr(optimizer, "history", [])


@pytest.mark.parametrize("name", [name for name in JOBS if name not in REFUSED and name not in IN_BF16])
def test_two_processes_take_the_course_of_one(ran, name):
    values, history = alone(**{k: v for k, v in JOBS[name].items() if k in ("steps", "clip", "dls", "model")})
    for made in ran[name]:
        assert "error" not in made, made["error"]
        for key, value in values.items():
            torch.testing.assert_close(made["course"][-1][key], value, rtol=1e-5, atol=1e-5)
        assert [tuple(selection[:3]) for selection in made["history"]] == [selection[:3] for selection in history]


@pytest.mark.parametrize("name", [name for name in JOBS if "dls" in JOBS[name] and name not in REFUSED])
def test_layers_outside_the_selection_do_not_move(ran, name):
    for made in ran[name]:
        assert made["history"] == ran[name][0]["history"] and len(made["history"]) >= 3
        selected = {step: layers for step, layers, _, _ in made["history"]}
        for step, (before, after) in enumerate(zip(made["course"], made["course"][1:], strict=False), start=1):
            now = selected.get(step - step % INTERVAL, range(4))
            layer_moved = dict.fromkeys(range(4), False)
            for key in before:
                layer_moved[int(key.split("layers.")[1][0])] |= not torch.equal(before[key], after[key])
            assert layer_moved == {layer: layer in now for layer in range(4)}, step


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_skip_freezes_and_mask_does_not(ran, name):
    last = ran[name][0]["history"][-1][1]  # of step 24, and step 27 does not select
    layers = {int(key.split("layers.")[1][0]) for key in ran[name][0]["frozen"]}
    assert layers == set(range(4)) - set(last)
    assert not ran[f"{name}-mask"][0]["frozen"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_refused(ran, name):
    for made in ran[name]:
        assert re.match(REFUSED[name], made["error"])


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory):
    """A folder with a base model and `rosa` and `road`, what RosaTrainer makes of it in a single process; and the
    selections of the former."""
    folder = tmp_path_factory.mktemp("finetune")
    make_model().save_pretrained(folder / "base")
    for method in ("road", "rosa"):
        trainer = make_trainer(folder, method, method=method, response_logits=False)
        trainer.train()
        trainer.save_model()
    return folder, trainer.layer_selection.history


@pytest.mark.parametrize("stage", [2, 3])
def test_rosa_trainer_under_zero_stops_resumes_and_saves_what_one_process_does(launch, trained_alone, stage):
    folder, history = trained_alone
    status, output = launch("torchrun", "zero_finetune.py", folder, stage)
    assert status == 0, output[-4000:]
    for method, expected in (("rosa", history), ("road", [])):
        under_zero = folder / f"{method}-zero{stage}"
        for rank in (0, 1):
            made = torch.load(under_zero / f"rank{rank}.pt", weights_only=True)
            assert [selection[:3] for selection in made["history"]] == [selection[:3] for selection in expected]
            assert "load the adapter before deepspeed.initialize" in made["error"]
            assert len(made["logits"]) == 6 and max(made["logits"]) <= 2 * 7 + 1  # of the responses alone
        alone, ours = (load_file(place / WEIGHTS_NAME) for place in (folder / method, under_zero))
        assert alone.keys() == ours.keys()
        for name, value in alone.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
        checkpoint = under_zero / "checkpoint-6"
        rosa.load_adapter(AutoModelForCausalLM.from_pretrained(folder / "base"), checkpoint)
        with pytest.raises(ValueError, match="checkpoint-6 was written under DeepSpeed.*rosa.load_adapter"):
            make_trainer(folder, method, method=method).train(resume_from_checkpoint=str(checkpoint))

"""Liger's kernels replace the rotary function that RoSA serves: before, after, and through the Trainer.

Of Liger's kernels only RoPE runs in Triton's interpreter, so that is the one that these tests apply.
"""

import pytest
import torch
from liger_kernel.transformers import apply_liger_kernel_to_qwen2
from transformers import TrainingArguments
from transformers.models.qwen2 import modeling_qwen2

import rosa
from rosa.models.rotary import family_function

ROPE_ALONE = dict(
    rope=True, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False
)  # fmt: skip


@pytest.fixture(autouse=True)
def _the_familys_own_function_before_and_after(monkeypatch):
    own = family_function(modeling_qwen2.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", own)


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_liger_before_patch_is_probed_as_the_family_would_be(make_model, make_patched, batch, recwarn):
    expected = gradients(make_patched(), batch)
    model = make_model()
    apply_liger_kernel_to_qwen2(**ROPE_ALONE)
    plain = model(**batch).logits
    rosa.patch(model, rosa.RosaConfig(rank=4))
    torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=1e-5)
    assert not [w for w in recwarn if "replaced" in str(w.message) or "since the model" in str(w.message)]
    rosa.unpatch(model)
    ours = gradients(make_patched(), batch)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_liger_after_patch_is_noticed_and_changes_nothing_in_adapted_layers(make_patched, batch):
    model = make_patched()
    expected = gradients(model, batch)
    apply_liger_kernel_to_qwen2(**ROPE_ALONE)
    with pytest.warns(
        UserWarning, match="apply_rotary_pos_emb of .*qwen2 is liger_kernel.*since the model was patched"
    ):
        ours = gradients(model, batch)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_function_replaced_after_compilation_is_named(make_patched, batch, monkeypatch):
    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        return q * cos.unsqueeze(unsqueeze_dim), k

    model = make_patched()
    compiled = torch.compile(model, backend="eager")
    compiled(**batch, use_cache=False)
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", rotate)
    with pytest.raises(RuntimeError, match="another library replaced the family's function after this model was comp"):
        compiled(**batch, use_cache=False)


def test_use_liger_kernel_of_the_trainers_arguments(make_patched, batch, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], max_steps=2, use_liger_kernel=True, liger_kernel_config=ROPE_ALONE, use_cpu=True
    )
    rows = [{name: t[0] for name, t in batch.items()}] * 8
    model = make_patched()
    before = model.model.layers[0].self_attn.roae.up.detach().clone()
    trainer = rosa.RosaTrainer(model, arguments, train_dataset=rows)
    with pytest.warns(UserWarning, match="is liger_kernel.*since the model was patched"):
        trainer.train()
    assert not torch.equal(model.model.layers[0].self_attn.roae.up, before)


def test_a_function_that_rotates_in_no_known_way_is_named_with_its_library(make_model, monkeypatch):
    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        return q.flip(-1), k

    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", rotate)
    with pytest.raises(
        rosa.UnsupportedModelError, match="rotate fits no known layout.*not the family's own.*rope=False"
    ):
        rosa.patch(make_model())
    assert modeling_qwen2.apply_rotary_pos_emb is rotate


OVERWRITTEN = "keeps the output of .*gate_proj for backward, and Liger's MLP overwrites it.*variant=2"


@pytest.fixture
def _the_familys_own_mlp_after(monkeypatch):
    monkeypatch.setattr(modeling_qwen2, "Qwen2MLP", modeling_qwen2.Qwen2MLP)


@pytest.mark.usefixtures("_the_familys_own_mlp_after")
def test_road_1_is_refused_where_ligers_mlp_would_overwrite_what_it_keeps(make_model, tmp_path):
    mlp_alone = ROPE_ALONE | dict(rope=False, swiglu=True)
    model, patched_first = make_model(), make_model()
    rosa.patch(patched_first, rosa.RoadConfig(variant=1))
    apply_liger_kernel_to_qwen2(**mlp_alone, model=model)
    with pytest.raises(ValueError, match=OVERWRITTEN):
        rosa.patch(model, rosa.RoadConfig(variant=1))
    assert not rosa.is_patched(model)
    rosa.patch(model, rosa.RoadConfig(variant=1, targets=("q_proj", "v_proj")))
    rosa.unpatch(model)
    rosa.patch(model, rosa.RoadConfig(variant=2))

    apply_liger_kernel_to_qwen2(**mlp_alone, model=patched_first)
    with pytest.raises(ValueError, match=OVERWRITTEN):
        rosa.RosaTrainer(patched_first, TrainingArguments(str(tmp_path), report_to=[]))

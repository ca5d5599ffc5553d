"""What DeepSpeed's ZeRO asks of a run, where one process can tell: param groups by layer, and what is refused."""

import pytest
import torch
from torch import nn

import rosa
from rosa.selection.zero import check_optimizer_is_used


def test_groups_are_of_one_layer_each_and_those_of_norms_come_last(make_patched):
    model = make_patched()
    model.lm_head.weight.requires_grad_(True)  # outside the layers
    norms = [p for n, p in model.named_parameters() if "layernorm" in n]
    others = [p for p in rosa.trainable_parameters(model) if not any(p is norm for norm in norms)]
    groups = rosa.layer_groups(model, [{"params": norms, "weight_decay": 0.0}, {"params": others, "lr": 0.5}])
    assert [group["layer"] for group in groups] == [None, 0, 1, 2, 3, 0, 1, 2, 3]
    assert [group["last"] for group in groups] == [False] * 8 + [True]
    assert [group.get("lr") for group in groups] == [0.5] * 5 + [None] * 4
    assert [group.get("weight_decay") for group in groups] == [None] * 5 + [0.0] * 4
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups[1:]:
        assert all(f"layers.{group['layer']}." in names[id(p)] for p in group["params"])
    assert [len(group["params"]) for group in groups] == [1, 4, 4, 4, 4, 2, 2, 2, 2]
    assert rosa.layer_groups(model)[-1]["params"] == groups[-1]["params"]


def test_groups_by_layer_train_as_one_group_does(make_patched, batch):
    trained = []
    for make_groups in (rosa.trainable_parameters, rosa.layer_groups):
        model = make_patched().train()
        optimizer = rosa.DynamicLayerSelection(torch.optim.AdamW(make_groups(model), lr=1e-2), model, interval=3)
        for _ in range(8):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(dict(model.named_parameters()))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_norms_alone_are_refused(make_patched):
    model = make_patched()
    norms = [p for n, p in model.named_parameters() if "layernorm" in n]
    with pytest.raises(ValueError, match="only norms are to train"):
        rosa.layer_groups(model, [{"params": norms}])


@pytest.mark.parametrize(
    "config, message",
    [
        ({"optimizer": {"type": "AdamW"}}, "has an `optimizer` of its own: take it out, or use dls=None"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            '"zero_force_ds_cpu_optimizer": false, or use dls=None',
        ),
    ],
)
def test_a_configuration_that_puts_another_optimizer_in_place_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer_is_used(config)


def test_a_configuration_that_keeps_the_optimizer_passes():
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    check_optimizer_is_used({"zero_optimization": offload, "zero_force_ds_cpu_optimizer": False})
    check_optimizer_is_used({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none"}}})


def test_norms_that_zero_3_has_partitioned_in_16_bits_are_not_widened(make_model):
    model = make_model(dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight.ds_id = 0  # ZeRO-3's mark
    with pytest.raises(ValueError, match=r'torch.bfloat16 already.*adapter_dtype="bfloat16"'):
        rosa.patch(model)
    assert not rosa.is_patched(model)
    rosa.patch(model, rosa.RosaConfig(adapter_dtype="bfloat16"))


def test_what_layers_share_has_no_group_of_one_layer(make_model):
    model = make_model()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    rosa.patch(model)
    with pytest.raises(ValueError, match="layers 0 and 1 share a parameter that is to train.*or use dls=None"):
        rosa.layer_groups(model)


def test_norms_that_train_outside_of_zeros_optimizer_are_refused(make_patched):
    model = make_patched()
    matrices = [p for p in rosa.trainable_parameters(model) if p.ndim == 2]
    for parameter in matrices:
        parameter._hp_mapping = None  # ZeRO's mark
    groups = rosa.layer_groups(model, [{"params": matrices}])
    optimizer = rosa.DynamicLayerSelection(torch.optim.AdamW(groups), model)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(torch.zeros(1))]  # as ZeRO puts in their place
    model(input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long)).loss.backward()
    with pytest.raises(ValueError, match="8 norms require gradients but are not in the optimizer"):
        optimizer.step()

"""Adapters do not depend on what wraps a model, DDP, torch.compile, checkpoints or PEFT, nor on the process."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import rosa

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def lora(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))


def layer_by_layer(wrap):
    def wrapped(model):
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrap(layer)
        return model

    return wrapped


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "compile": compiled,
    "lora": lora,
    "ddp-lora": lambda model: DistributedDataParallel(lora(model)),
    "layers-compiled": layer_by_layer(compiled),
    "layers-checkpointed": layer_by_layer(checkpoint_wrapper),
}


@pytest.mark.parametrize("wrapped", ["before patch", "after patch"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_adapters_go_from_wrapped_models_to_plain_ones_and_back(
    wrapper, wrapped, process_group, make_model, make_patched, stir, batch, tmp_path
):
    torch.compiler.reset()
    wrap, config = WRAPPERS[wrapper], rosa.RosaConfig(rank=4)
    plain = make_patched(num_hidden_layers=2).eval()
    rosa.save_adapter(plain, tmp_path / "plain")
    if wrapped == "after patch":
        model = wrap(stir(rosa.patch(make_model(num_hidden_layers=2), config)))
    else:
        model = stir(rosa.patch(wrap(make_model(num_hidden_layers=2)), config))
    rosa.save_adapter(model.eval(), tmp_path / "wrapped")
    ours, theirs = load_file(tmp_path / "wrapped" / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 6

    logits = model(**batch).logits
    fresh = rosa.load_adapter(make_model(num_hidden_layers=2).eval(), tmp_path / "wrapped")
    torch.testing.assert_close(fresh(**batch).logits, logits)
    with rosa.disabled(model):
        torch.testing.assert_close(model(**batch).logits, make_model(num_hidden_layers=2).eval()(**batch).logits)
    other = rosa.load_adapter(wrap(make_model(num_hidden_layers=2)).eval(), tmp_path / "plain", "other")
    torch.testing.assert_close(other(**batch).logits, plain(**batch).logits)
    rosa.load_adapter(model, tmp_path / "plain", "other")
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    rosa.set_adapter(model, "default")
    torch.testing.assert_close(model(**batch).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ddp_still_sees_every_gradient_after_a_reference_pass(process_group, make_patched, batch, dtype):
    plain = make_patched(num_hidden_layers=2, dtype=dtype).train()
    ddp = DistributedDataParallel(make_patched(num_hidden_layers=2, dtype=dtype).train())
    for _ in range(2):
        with rosa.disabled(ddp), torch.no_grad():
            ddp(**batch)
        for model in (plain, ddp):
            model(**batch).loss.backward()
    for ours, theirs in zip(rosa.trainable_parameters(ddp), rosa.trainable_parameters(plain), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_model_inside_a_module_of_ones_own(make_patched, batch, tmp_path):
    class WithValueHead(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.head = model, nn.Linear(32, 1)

    model = make_patched()
    rosa.save_adapter(WithValueHead(model), tmp_path / "inside")
    rosa.save_adapter(model, tmp_path / "plain")
    assert (tmp_path / "inside" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


ADAPTS_AGAIN = """
import sys, torch, rosa
folder = sys.argv[1]
model, batch, expected = torch.load(f"{folder}/model.pt", weights_only=False)
call = torch.compile(model, backend="eager", fullgraph=True) if sys.argv[2] == "compiled" else model
with torch.no_grad():
    for name in ("second", "first"):
        rosa.set_adapter(model, name)
        torch.testing.assert_close(call(**batch, use_cache=False).logits, expected[name])
    model.save_pretrained(f"{folder}/adapter")
    rosa.unpatch(model)
    torch.testing.assert_close(call(**batch, use_cache=False).logits, expected["base"])
print("adapted")
"""


@pytest.mark.parametrize("call", ["plain", "compiled"])
def test_a_model_pickled_whole_adapts_again_in_another_process(call, make_model, stir, batch, tmp_path):
    model = make_model(num_hidden_layers=2).eval()
    with torch.no_grad():
        expected = {"base": model(**batch).logits}
        for name, rank in (("first", 4), ("second", 2)):
            stir(rosa.patch(model, rosa.RosaConfig(rank=rank, r_low=0.5), name))
            expected[name] = model(**batch).logits
    torch.save((model, batch, expected), tmp_path / "model.pt")
    command = [sys.executable, "-c", ADAPTS_AGAIN, tmp_path, call]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "adapted\n", done.stderr
    fresh = rosa.load_adapter(make_model(num_hidden_layers=2).eval(), tmp_path / "adapter")
    torch.testing.assert_close(fresh(**batch).logits, expected["first"])

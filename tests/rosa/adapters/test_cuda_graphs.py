"""CUDA graphs of patched models: a forward pass and a whole training step, replayed, equal eager ones."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rosa

WARMUP, REPLAYS = 3, 4  # steps before the capture, as torch asks for, and after it


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request, make_patched):
    """Without attention kernels that add up in no fixed order: a step is the same whenever it runs."""
    return make_patched(dtype=request.param, num_hidden_layers=2, attn_implementation="eager")


def tokens(step):
    return torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(step))


def forward(model, ids):
    """The mask is made here: making it, transformers asks the device whether the batch is packed."""
    batch, seq = ids.shape
    mask = torch.full((batch, 1, seq, seq), float("-inf"), dtype=model.dtype, device=ids.device).triu(1)
    return model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False)


def adamw(model):
    return torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2, capturable=True)


def training_step(model, optimizer, ids):
    """Gradients are assigned, not added to: the caller has cleared them."""
    loss = forward(model, ids).loss
    loss.backward()
    optimizer.step()
    return loss


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_operator_waits_for_the_device(model, kernel_device, backend, monkeypatch):
    """What a capture refuses: values and shapes that the host must read."""
    monkeypatch.setenv("ROSA_BACKEND", backend)
    model = model.to(kernel_device).train()
    with Operators() as step:
        forward(model, tokens(0).to(kernel_device)).loss.backward()
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}
    assert not step.names & {f"aten::{name}" for name in waiting}
    assert ("rosa::roae_forward" in step.names or "rosa::rope_roae_forward" in step.names) == (backend == "triton")


def warm_up(run):
    """Runs on a stream of its own before a capture: kernels are compiled and cuBLAS has its workspace."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(WARMUP):
            run(step)
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
@torch.no_grad()
def test_a_forward_pass_is_captured_and_replayed(model):
    model = model.cuda().eval()
    ids = tokens(0).cuda()
    warm_up(lambda step: forward(model, ids))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(model, ids).logits
    for step in range(1, REPLAYS):
        ids.copy_(tokens(step))
        graph.replay()
        torch.testing.assert_close(captured, forward(model, tokens(step).cuda()).logits)


@pytest.mark.gpu
def test_a_training_step_is_captured_and_replayed(model):
    model = model.cuda().train()
    twin = copy.deepcopy(model)
    optimizer, twins = adamw(model), adamw(twin)
    ids = tokens(0).cuda()

    def eager_step(model, optimizer, step):
        optimizer.zero_grad()
        return training_step(model, optimizer, tokens(step).cuda())

    for step in range(WARMUP):
        eager_step(twin, twins, step)
    warm_up(lambda step: eager_step(model, optimizer, step))
    optimizer.zero_grad()  # so that the captured backward assigns gradients of the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(model, optimizer, ids)

    start = [p.detach().clone() for p in rosa.trainable_parameters(model)]
    for step in range(WARMUP, WARMUP + REPLAYS):
        ids.copy_(tokens(step))
        graph.replay()
        torch.testing.assert_close(captured, eager_step(twin, twins, step))
    for ours, theirs, before in zip(
        rosa.trainable_parameters(model), rosa.trainable_parameters(twin), start, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert not torch.equal(ours, before)

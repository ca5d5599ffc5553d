"""The operators that the launches are to torch: their schemas, their shapes without data, and dynamic shapes."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import rosa_kernels.roae_triton
import rosa_kernels.rope_road_triton
import rosa_kernels.rope_roae_triton  # noqa: F401  (registers its operators)
from rosa_kernels import road, roae, rope_road, rope_roae

ROSA = torch.ops.rosa
BATCH, SEQ, HEADS, HEAD_DIM, LOW_PAIRS, RANK = 2, 5, 4, 16, 2, 6
D_LOW, TOKENS = 2 * LOW_PAIRS, BATCH * SEQ


@pytest.fixture
def normal(kernel_device):
    return lambda *size: torch.randn(size, device=kernel_device).bfloat16()


@pytest.fixture(params=[2, 4], ids=["grouped", "shared signal"])
def key_heads(request):
    return request.param


@pytest.fixture
def heads(normal):
    """`heads(n)`, laid out as Hugging Face's transposed projections."""
    return lambda count: normal(BATCH, SEQ, count, HEAD_DIM).transpose(1, 2)


def rotary(normal):
    return normal(1, SEQ, HEAD_DIM // 2), normal(1, SEQ, HEAD_DIM // 2)


def signals(normal, key_heads):
    return normal(BATCH, SEQ, HEADS * D_LOW), normal(BATCH, SEQ, key_heads * D_LOW) if key_heads < HEADS else None


def roae_weights(normal, key_heads):
    grouped = key_heads < HEADS
    gqa_down, gqa_up = (normal(RANK, HEADS * D_LOW), normal(key_heads * D_LOW, RANK)) if grouped else (None, None)
    return normal(HEADS * D_LOW, RANK), gqa_down, gqa_up


def low_pairs(normal, key_heads):
    return normal(TOKENS, (HEADS + key_heads) * D_LOW)


@pytest.mark.parametrize("store", [True, False])
def test_rope_roae_forward(normal, heads, key_heads, store):
    signal = signals(normal, key_heads)
    arguments = (heads(HEADS), heads(key_heads), *rotary(normal), *signal, 0.1, False, store)
    torch.library.opcheck(ROSA.rope_roae_forward, arguments)


@pytest.mark.parametrize("needs", [[True] * 4, [True, False, False, False], [False, False, True, False]])
def test_rope_roae_backward(normal, heads, key_heads, needs):
    signal, low = signals(normal, key_heads), low_pairs(normal, key_heads)
    needs = [*needs[:3], needs[3] and key_heads < HEADS]
    arguments = (heads(HEADS), heads(key_heads), *rotary(normal), *signal, low, 0.1, True, True, needs)
    torch.library.opcheck(ROSA.rope_roae_backward, arguments)


@pytest.mark.parametrize("store", [True, False])
def test_roae_forward(normal, heads, key_heads, store):
    weights = roae_weights(normal, key_heads)
    arguments = (heads(HEADS), heads(key_heads), *rotary(normal), normal(TOKENS, RANK), *weights, 0.1, False, store)
    torch.library.opcheck(ROSA.roae_forward, arguments)


NEEDS = [(True, True, True), (True, False, False), (False, True, False)]  # dq and dk, dU, W_GQA's gradients


@pytest.mark.parametrize("needs", NEEDS)
def test_roae_backward_keys(normal, heads, needs):
    gqa_up, low, key_latent = normal(2 * D_LOW, RANK), low_pairs(normal, 2), normal(TOKENS, RANK)
    arguments = (heads(2), *rotary(normal), gqa_up, low, key_latent, HEADS, 0.1, False, True, *needs)
    torch.library.opcheck(ROSA.roae_backward_keys, arguments)


@pytest.mark.parametrize("needs", NEEDS)
def test_roae_backward(normal, heads, key_heads, needs):
    up, gqa_down, _ = roae_weights(normal, key_heads)
    low, dkey_latent = low_pairs(normal, key_heads), normal(TOKENS, RANK) if key_heads < HEADS else None
    arguments = (
        heads(HEADS), heads(key_heads), *rotary(normal), normal(TOKENS, RANK), up, gqa_down, low, dkey_latent,
        0.1, False, False, *needs,
    )  # fmt: skip
    torch.library.opcheck(ROSA.roae_backward, arguments)


def test_weight_gradient(normal):
    torch.library.opcheck(ROSA.weight_gradient, (normal(TOKENS, 8), normal(TOKENS, RANK), torch.float32))


VARIANTS = [1, 2, 4]
ADAPTERS = 3


@pytest.fixture(params=[False, True], ids=["one adapter", "adapters"])
def indexed(request):
    return request.param


def road_weights(width, variant, indexed, device):
    """index, theta and alpha."""
    tables = (ADAPTERS,) * indexed
    theta, alpha = (torch.randn(*tables, width * variant // 2, device=device) for _ in range(2))
    return torch.tensor([2, 0], dtype=torch.int32, device=device) if indexed else None, theta, alpha


@pytest.mark.parametrize("variant", VARIANTS)
def test_road_forward(normal, kernel_device, indexed, variant):
    index, *weights = road_weights(8, variant, indexed, kernel_device)
    torch.library.opcheck(ROSA.road_forward, (normal(BATCH, SEQ, 8), *weights, index, variant, 4, 4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_road_(normal, kernel_device, indexed, variant):
    index, *weights = road_weights(8, variant, indexed, kernel_device)
    torch.library.opcheck(ROSA.road_, (normal(BATCH, SEQ, 8), *weights, index, variant, 2, 2))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("trains", "need_dx"), [(True, True), (True, False), (False, True)])
def test_road_backward(normal, kernel_device, indexed, variant, trains, need_dx):
    index, *weights = road_weights(8, variant, indexed, kernel_device)
    dout, kept = normal(BATCH, SEQ, 8), normal(BATCH, SEQ, 8) if trains else None
    torch.library.opcheck(ROSA.road_backward, (dout, kept, *weights, index, variant, 2, 2, need_dx))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("needs", [[True] * 4, [True, False, False, True]])
def test_road_reduce(kernel_device, indexed, variant, needs):
    index, *weights = road_weights(8, variant, indexed, kernel_device)
    sums = torch.randn(2 * 2 * BATCH, 8 if variant == 1 else 16, device=kernel_device)
    torch.library.opcheck(ROSA.road_reduce, (sums, index, *weights, *weights, variant, needs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rope_road_forward(normal, heads, kernel_device, indexed, variant):
    index, *query = road_weights(HEADS * HEAD_DIM, variant, indexed, kernel_device)
    _, *key = road_weights(2 * HEAD_DIM, variant, indexed, kernel_device)
    for weights in ((*query, *key), (*query, None, None)):
        arguments = (heads(HEADS), heads(2), *rotary(normal), index, *weights, variant, True, False)
        torch.library.opcheck(ROSA.rope_road_forward, arguments)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])  # dq and dk, sums of the queries
def test_rope_road_backward(normal, heads, kernel_device, indexed, variant, needs):
    need_dx, need_sums = needs
    index, *query = road_weights(HEADS * HEAD_DIM, variant, indexed, kernel_device)
    arguments = (
        heads(HEADS), heads(2), *rotary(normal), index, *query, None, None, heads(HEADS) if need_sums else None, None,
        variant, False, True, True, need_dx, need_dx,
    )  # fmt: skip
    torch.library.opcheck(ROSA.rope_road_backward, arguments)


def test_all_operators_are_checked_here():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("rosa::")}
    assert {f"test_{name}" for name in registered} <= globals().keys()


# In 16 bits, of Qwen2.5-7B's shape: there `roae` is one op on every device.
@pytest.mark.parametrize("function", [roae, rope_roae])
def test_one_graph_for_any_number_of_tokens(function):
    """Without data: the shapes of the launches depend on the tokens, and must not do so by a branch."""
    graphs = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=graphs)
    def loss(*tensors):
        q_out, k_out = function(*tensors, backend="triton")
        return q_out.sum() + k_out.sum()

    counts = set()
    with FakeTensorMode():
        weights = [torch.empty(*size, requires_grad=True) for size in ((128, 3584), (896, 128), (128, 896), (128, 128))]
        for batch, seq in ((2, 11), (3, 700), (2, 5000), (7, 100_000)):
            q, k, signal, key_signal, hidden_states = (
                torch.empty(batch, seq, *size, dtype=torch.bfloat16, requires_grad=True)
                for size in ((28, 128), (4, 128), (896,), (128,), (3584,))
            )
            cos, sin = (torch.empty(1, seq, 128) for _ in range(2))
            others = (hidden_states, *weights) if function is roae else (signal, key_signal)
            loss(q.transpose(1, 2), k.transpose(1, 2), cos, sin, *others).backward()
            counts.add(graphs.frame_count)
    assert len(counts) == 1, "made again after the first call"


@pytest.mark.parametrize("indexed", [False, True], ids=["one adapter", "adapters"])
@pytest.mark.parametrize("function", [road, rope_road])
def test_one_graph_of_road_for_any_number_of_tokens(function, indexed):
    graphs = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=graphs)
    def loss(q, k, cos, sin, query, key, index):
        if function is road:
            return road(q.transpose(1, 2).flatten(2), *query, index, variant=2, backend="triton").sum()
        q_out, k_out = rope_road(q, k, cos, sin, query, key, index, variant=2, backend="triton")
        return q_out.sum() + k_out.sum()

    counts = set()
    with FakeTensorMode():
        query, key = (
            [torch.empty(*(8,) * indexed, width, requires_grad=True) for _ in range(2)] for width in (3584, 512)
        )
        for batch, seq in ((2, 11), (3, 700), (2, 5000), (7, 100_000)):
            q, k = (torch.empty(batch, seq, n, 128, dtype=torch.bfloat16, requires_grad=True) for n in (28, 4))
            cos, sin = (torch.empty(1, seq, 128) for _ in range(2))
            index = torch.empty(batch, dtype=torch.int32) if indexed else None
            loss(q.transpose(1, 2), k.transpose(1, 2), cos, sin, query, key, index).backward()
            counts.add(graphs.frame_count)
    assert len(counts) == 1, "made again after the first call"

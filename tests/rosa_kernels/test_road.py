"""road: the Triton backend against the float64 reference, its gradients, its promises, its errors."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from rosa_kernels import road, road_triton
from rosa_kernels.road_reference import NUMBERS, rotate

VARIANTS = [1, 2, 4]


def make_inputs(shape, *, variant, adapters=None, dtype=torch.float64, device="cpu"):
    """x, theta, alpha and index; with `adapters` the sequences take them in turns, from the last one on."""
    tables = () if adapters is None else (adapters,)
    x = torch.randn(shape, dtype=dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theta, alpha = (
        torch.randn(*tables, int(shape[-1] * NUMBERS[variant]), dtype=wide, device=device) for _ in range(2)
    )
    index = None
    if adapters is not None:
        index = (adapters - 1 - torch.arange(shape[0], device=device) % adapters).int()
    return x, theta, alpha, index


def run(inputs, **options):
    """z, and the gradients of a random projection of it to x, theta and alpha."""
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    z = road(*leaves, inputs[3], **options)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(z)
    return [z, *torch.autograd.grad(z, leaves, direction)]


def relative_errors(values, exact):
    return [((v.double() - e).norm() / e.norm()).item() for v, e in zip(values, exact, strict=True)]


# Shapes, pairings, an index or none. Widths that are no power of two, past a block of columns, one pair; groups that
# are read wide, narrow, that are no power of two; heads that begin with a group; one to four dimensions.
CASES = {
    "neighbours": dict(shape=(2, 5, 24)),
    "neighbours, adapters": dict(shape=(3, 5, 24), adapters=3),
    "one pair": dict(shape=(2, 3, 2), adapters=2),
    "past a block of columns": dict(shape=(2, 3, 262), adapters=2),
    "one row": dict(shape=(12,)),
    "rows": dict(shape=(5, 12)),
    "rows, adapters": dict(shape=(5, 12), adapters=2),
    "four dimensions": dict(shape=(2, 2, 3, 8), adapters=2),
    "peft's groups": dict(shape=(2, 3, 32), group=8),
    "heads": dict(shape=(2, 3, 64), group=32, adapters=2),
    "heads of 20": dict(shape=(2, 3, 60), group=20),
    "partial rotary": dict(shape=(2, 3, 40), group=8, head_dim=20, adapters=2),
    "neighbours of heads": dict(shape=(1, 3, 40), group=2, head_dim=20),
}


def of_case(case, variant, device, **inputs):
    """The inputs of a case, and the options of `road` that it stands for."""
    pairing = {name: case[name] for name in ("group", "head_dim") if name in case}
    inputs = dict(shape=case["shape"], adapters=case.get("adapters")) | inputs
    return make_inputs(**inputs, variant=variant, device=device), dict(variant=variant, **pairing)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_triton_computes_what_the_reference_computes_in_float64(kernel_device, case, variant):
    inputs, options = of_case(case, variant, kernel_device)
    ours, exact = (run(inputs, **options, backend=backend) for backend in ("triton", "reference"))
    assert max(relative_errors(ours, exact)) < 1e-14


@pytest.mark.parametrize("adapters", [None, 2])
@pytest.mark.parametrize(
    "programs", [1, 4]
)  # with 4 a program does two blocks of tokens, and the last one is past them
def test_however_the_tokens_are_divided_among_programs(kernel_device, monkeypatch, adapters, programs):
    monkeypatch.setattr(road_triton, "MAX_BLOCK_T", 2)
    monkeypatch.setattr(road_triton, "PROGRAMS", programs)
    for variant in VARIANTS:
        inputs = make_inputs((2, 7, 4), variant=variant, adapters=adapters, device=kernel_device)
        exact = run(inputs, variant=variant, backend="reference")
        assert max(relative_errors(run(inputs, variant=variant, backend="triton"), exact)) < 1e-14


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3), seq=st.integers(1, 40), half=st.integers(1, 20), rest=st.integers(0, 9),
    heads=st.integers(1, 4), adapters=st.sampled_from([None, 1, 3]), variant=st.sampled_from(VARIANTS),
)  # fmt: skip
def test_triton_equals_reference_at_any_shape(kernel_device, batch, seq, half, rest, heads, adapters, variant):
    head_dim = 2 * (half + rest)
    shape = (batch, seq, heads * head_dim)
    inputs = make_inputs(shape, variant=variant, adapters=adapters, device=kernel_device)
    options = dict(variant=variant, group=2 * half, head_dim=head_dim)
    ours, exact = (run(inputs, **options, backend=backend) for backend in ("triton", "reference"))
    assert max(relative_errors(ours, exact)) < 1e-13


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(kernel_device, backend, variant):
    x, theta, alpha, index = make_inputs((2, 1, 4), variant=variant, adapters=2, device=kernel_device)
    leaves = [t.requires_grad_() for t in (x, theta, alpha)]
    options = dict(variant=variant, group=4, backend=backend)
    assert torch.autograd.gradcheck(lambda *leaves: road(*leaves, index, **options), leaves)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_16_bit_error_is_no_larger_than_that_of_the_same_mathematics_in_eager(kernel_device, dtype, variant):
    x, theta, alpha, _ = make_inputs((2, 33, 64), variant=variant, dtype=dtype, device=kernel_device)
    inputs = (x, theta, 1 + 0.1 * alpha, None)
    exact = run((x.double(), theta.double(), inputs[2].double(), None), variant=variant, backend="reference")
    ours = relative_errors(run_and_round(inputs, variant), exact)
    eager = relative_errors(run_eager(inputs, variant), exact)
    if dtype != torch.float32:  # in float32 both round as they compute, and neither is nearer
        assert all(o <= e for o, e in zip(ours, eager, strict=True)), (ours, eager)
    assert max(ours) < {torch.float32: 5e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]


def run_and_round(inputs, variant):
    """`run` on the Triton backend. Triton's interpreter truncates to bfloat16, where a GPU rounds to nearest: there the
    kernel computes on the same values in float32, as it does inside, and torch rounds."""
    x, *others = inputs
    if not x.is_cuda and x.dtype == torch.bfloat16:
        z, dx, *grads = run((x.float(), *others), variant=variant, backend="triton")
        return [z.bfloat16(), dx.bfloat16(), *grads]
    return run(inputs, variant=variant, backend="triton")


def run_eager(inputs, variant):
    """Eq. 4 as it is written without a kernel: two vectors in x's dtype, then operation by operation."""
    x, theta, alpha = (t.detach().requires_grad_() for t in inputs[:3])
    width = x.shape[-1]
    if variant == 1:
        angles, scales = (t.repeat_interleave(2).repeat(2) for t in (theta, alpha))
    else:
        angles, scales = (t.repeat(2) if variant == 2 else t for t in (theta, alpha))
    first = (scales[:width] * angles[:width].cos()).to(x.dtype)
    second = (scales[width:] * angles[width:].sin()).to(x.dtype)
    z = first * x + second * rotate(x)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(z)
    return [z, *torch.autograd.grad(z, (x, theta, alpha), direction)]


def test_angles_of_any_size(kernel_device):
    """Within what float32 resolves; the interpreter, which does not fuse multiplications and additions, to 8,000."""
    largest = 1e6 if kernel_device == "cuda" else 8e3
    theta = torch.cat((torch.randn(4000), (2 * torch.rand(4000) - 1) * largest, torch.arange(-48, 49) * torch.pi / 4))
    theta = torch.cat((theta, theta[:1])).to(kernel_device)
    x = torch.eye(2, device=kernel_device)[:, None].expand(2, len(theta), 2).flatten(1)
    z = road(x, theta, torch.ones_like(theta), variant=1, backend="triton").unflatten(1, (-1, 2)).double()
    cos, sin = theta.double().cos(), theta.double().sin()
    exact = torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)))
    assert (z - exact).abs().max() < 1.2e-7


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_strides(kernel_device, variant):
    x, theta, alpha, _ = make_inputs((2, 3, 2, 12), variant=variant, device=kernel_device)
    index = torch.tensor([1, 0], dtype=torch.int32, device=kernel_device)
    tables = [torch.stack((t, 2 * t)) for t in (theta, alpha)]
    strided_tables = [torch.stack((t, t), -1)[..., 0] for t in tables]
    wide = torch.randn(2, 3, 24, dtype=torch.float64, device=kernel_device)
    layouts = (x.transpose(1, 2), x[:, :, 0], x[:, -1:, 0], x[:1, :1, 0].expand(2, 3, 12))
    for laid_out in (*layouts, wide[..., ::2], wide[..., 7:19]):
        leaves = [t.detach().requires_grad_() for t in (laid_out, *strided_tables)]
        others = [t.detach().requires_grad_() for t in (laid_out.contiguous(), *tables)]
        ours = road(*leaves, index, variant=variant, backend="triton")
        exact = road(*others, index, variant=variant, backend="reference")
        torch.testing.assert_close(ours, exact)
        # The gradient of a sum is expanded: strides of 0.
        grads = torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(exact.sum(), others)
        torch.testing.assert_close(*grads)


class Operators(TorchDispatchMode):
    """The operators that run, by name, and the sizes, in elements, of what the launches return."""

    def __enter__(self):
        self.names, self.sizes = [], []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "detach" not in function._schema.name:
            self.names.append(function._schema.name)
        if function.namespace == "rosa" and out is not None:
            self.sizes += [t.numel() for t in (out if isinstance(out, tuple) else (out,))]
        return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=["x", "theta", "alpha", "theta and alpha"])
def test_only_the_gradients_asked_for(kernel_device, variant, wanted):
    inputs = make_inputs((2, 3, 8), variant=variant, adapters=2, device=kernel_device)
    everything = run(inputs, variant=variant, backend="triton")[1:]
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs[:3])]
    with Operators() as forward:
        z = road(*leaves, inputs[3], variant=variant, backend="triton")
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(z)
    with Operators() as backward:
        z.backward(direction)
    for i, (leaf, expected) in enumerate(zip(leaves, everything, strict=True)):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected)
    assert [name for name in forward.names if name.startswith("rosa")] == ["rosa::road_forward"]
    adapts = wanted != (0,)
    numbers, sums = inputs[1].numel(), 2 * 2 * (4 if variant == 1 else 8)  # a row for each of two sequences
    assert backward.names == ["rosa::road_backward"] + ["rosa::road_reduce"] * adapts
    reduced = [numbers if i in wanted else 0 for i in (1, 2)] + [0, 0]
    assert backward.sizes == ([0, sums, *reduced] if adapts else [inputs[0].numel(), 0])


def test_no_copies_inside_the_launches(kernel_device):
    x, theta, alpha, index = make_inputs((2, 3, 8), variant=2, adapters=2, device=kernel_device)
    with Operators() as inside:
        road_triton.forward_launch(x, theta, alpha, index, 2, 2, 2)
        sums = road_triton.backward_launch(x, x, theta, alpha, index, 2, 2, 2, True).outputs[1]
        road_triton.reduce_launch(sums, index, theta, alpha, None, None, 2, [True, True, False, False])
    assert set(inside.names) <= {"aten::new_empty", "aten::view", "aten::_reshape_alias", "aten::unsqueeze"}
    theta, alpha = theta[0], alpha[0]
    with Operators() as outside:
        road(x, theta, alpha, variant=2, backend="triton")
    assert outside.names == ["rosa::road_forward"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_saves_its_output_for_variant_1_and_its_input_for_the_others(kernel_device, variant, frozen):
    x, theta, alpha, index = make_inputs((2, 3, 8), variant=variant, adapters=2, device=kernel_device)
    x.requires_grad_()
    theta.requires_grad_(not frozen)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        z = road(x, theta, alpha, index, variant=variant, backend="triton")
    kept = [] if frozen else [(z if variant == 1 else x).data_ptr()]
    assert sorted(saved) == sorted([theta.data_ptr(), alpha.data_ptr(), index.data_ptr(), *kept])


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_adapter_gets_the_gradients_of_its_sequences_and_slot_0_is_the_identity(kernel_device, variant):
    x, theta, alpha, _ = make_inputs((4, 3, 8), variant=variant, adapters=4, device=kernel_device)
    theta[0], alpha[0] = 0, 1
    index = torch.tensor([2, 0, 2, 1], dtype=torch.int32, device=kernel_device)
    z, dx, dtheta, dalpha = run((x, theta, alpha, index), variant=variant, backend="triton")
    assert torch.equal(z[1], x[1])
    assert not dtheta[3].any() and not dalpha[3].any()
    for adapter in (0, 1, 2):
        own = index == adapter
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(x)[own]
        leaves = [t.detach().requires_grad_() for t in (x[own], theta[adapter], alpha[adapter])]
        alone = road(*leaves, variant=variant, backend="triton")
        assert torch.equal(alone, z[own])
        expected = torch.autograd.grad(alone, leaves, direction)
        torch.testing.assert_close((dx[own], dtheta[adapter], dalpha[adapter]), expected)


def test_gradients_are_the_same_in_every_run(kernel_device, monkeypatch):
    monkeypatch.setattr(road_triton, "MAX_BLOCK_T", 2)
    inputs = make_inputs((2, 8, 4), variant=2, adapters=2, dtype=torch.float32, device=kernel_device)
    first, second = (run(inputs, variant=2, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_scale_of_zero_gets_no_gradient_from_variant_1_and_spoils_none(kernel_device):
    x, theta, alpha, _ = make_inputs((2, 3, 8), variant=1, device=kernel_device)
    alpha[1] = 0
    ours, exact = (run((x, theta, alpha, None), variant=1, backend=b) for b in ("triton", "reference"))
    assert ours[3][1] == 0
    exact[3][1] = 0
    assert max(relative_errors(ours, exact)) < 1e-14


@pytest.mark.parametrize("inplace", [True, False])
def test_writes_over_x_only_where_it_may(kernel_device, inplace):
    x, theta, alpha, index = make_inputs((2, 3, 8), variant=2, adapters=2, device=kernel_device)
    options = dict(variant=2, inplace=inplace, backend="triton")
    before, expected = x.clone(), road(x, theta, alpha, index, variant=2, backend="reference")
    theta.requires_grad_()
    assert torch.equal(road(x, theta, alpha, index, **options), expected) and torch.equal(x, before)
    strided = torch.stack((x, x), -1)[..., 0]
    with torch.no_grad():
        assert torch.equal(road(strided, theta, alpha, index, **options), expected) and torch.equal(strided, before)
        z = road(x, theta, alpha, index, **options)
    assert torch.equal(z, expected)
    assert (z is x) == inplace and torch.equal(x, expected if inplace else before)
    with torch.inference_mode():
        x = before.clone()
        assert (road(x, theta, alpha, index, **options) is x) == inplace


def test_a_graph_that_kept_what_was_written_over_says_so(kernel_device):
    x, theta, alpha, _ = make_inputs((2, 3, 8), variant=2, device=kernel_device)
    weight = torch.ones_like(x, requires_grad=True)
    product = weight * x
    road(x, theta, alpha, variant=2, inplace=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("variant", [1, 2])
def test_an_output_that_was_written_over_is_told_where_it_was_kept(kernel_device, variant):
    x, theta, alpha, _ = make_inputs((2, 3, 8), variant=variant, device=kernel_device)
    z = road(x, theta.requires_grad_(), alpha, variant=variant, backend="triton")
    z += 1  # as Falcon's layers do
    if variant == 1:
        with pytest.raises(RuntimeError, match="use variant=2"):
            z.sum().backward()
        return
    z.sum().backward()
    (expected,) = torch.autograd.grad(road(x, theta, alpha, variant=variant, backend="reference").sum(), theta)
    torch.testing.assert_close(theta.grad, expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph_with_equal_gradients(kernel_device, backend):
    x, theta, alpha, index = make_inputs((2, 3, 8), variant=2, adapters=2, dtype=torch.float32, device=kernel_device)
    torch.compiler.reset()
    leaves = [t.detach().requires_grad_() for t in (x, theta, alpha)]

    def loss(*leaves):
        return road(*leaves, index, variant=2, inplace=True, backend=backend).square().sum()

    grads = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(grads, torch.autograd.grad(compiled(*leaves), leaves), strict=True)
    )
    with torch.no_grad():
        before = x.clone()
        assert torch.allclose(compiled(x, theta, alpha), loss(x.clone(), theta, alpha)) and torch.equal(x, before)


def test_autocast_changes_nothing(kernel_device):
    inputs = make_inputs((2, 3, 8), variant=2, dtype=torch.float32, device=kernel_device)
    plain = run(inputs, variant=2, backend="triton")
    with torch.autocast(kernel_device, torch.bfloat16):
        inside = run(inputs, variant=2, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_double_backward_is_refused_by_name(kernel_device):
    x, theta, alpha, _ = make_inputs((2, 3, 8), variant=2, device=kernel_device)
    z = road(x.requires_grad_(), theta, alpha, variant=2, backend="triton")
    with pytest.raises(RuntimeError, match=r"road's Triton.*no double backward.*backend='reference'"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


@pytest.mark.parametrize("leaf", [0, 1, 2], ids=["x", "theta", "alpha"])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_not_dropped(kernel_device, leaf, grad):
    *inputs, _ = make_inputs((2, 3, 8), variant=2, device=kernel_device)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        assert road(*inputs, variant=2, backend="triton").isfinite().all()  # nothing has a tangent
        inputs[leaf] = forward_ad.make_dual(inputs[leaf], torch.ones_like(inputs[leaf]))
        with pytest.raises(RuntimeError, match=r"road's Triton.*no forward mode.*backend='reference'"):
            road(*inputs, variant=2, inplace=True, backend="triton")


@pytest.mark.parametrize("strided", [lambda index: index.repeat_interleave(2)[::2], lambda index: index[:1].expand(3)])
def test_an_index_of_any_stride(kernel_device, strided):
    x, theta, alpha, index = make_inputs((3, 2, 8), variant=2, adapters=3, device=kernel_device)
    inputs = x, theta, alpha, strided(index)
    ours, exact = (run(inputs, variant=2, backend=backend) for backend in ("triton", "reference"))
    assert max(relative_errors(ours, exact)) < 1e-14


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("adapters", [None, 2])
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=["no sequences", "no tokens"])
def test_empty(kernel_device, shape, adapters, backend):
    inputs = make_inputs(shape, variant=1, adapters=adapters, device=kernel_device)
    z, dx, dtheta, dalpha = run(inputs, variant=1, backend=backend)
    assert z.shape == dx.shape == shape
    assert not dtheta.any() and not dalpha.any()


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_that_reads_the_adapters_anew():
    x, theta, alpha, index = make_inputs((2, 3, 256), variant=2, adapters=2, dtype=torch.bfloat16, device="cuda")
    road(x, theta, alpha, index, variant=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = road(x, theta, alpha, index, variant=2)
    index.copy_(1 - index)
    graph.replay()
    assert torch.equal(captured, road(x, theta, alpha, index, variant=2))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    # 1,200,000 tokens of 2,048: 2.5e9 elements, 4.9 GB in bfloat16: the last tokens lie past 2^31 elements.
    x, theta, alpha, _ = make_inputs((1_200_000, 2048), variant=2, dtype=torch.bfloat16, device="cuda")
    tail = x[-5:].clone()
    assert torch.equal(road(x, theta, alpha, variant=2)[-5:], road(tail, theta, alpha, variant=2))


def zeros(*shape, **options):
    return torch.zeros(shape, **{"dtype": torch.float64, **options})


def index(*numbers, **options):
    return torch.tensor(numbers, **{"dtype": torch.int32, **options})


# What is changed in x [2, 3, 8], theta and alpha [8], of variant 2.
TABLES = dict(theta=zeros(4, 8), alpha=zeros(4, 8))
BAD_INPUTS = {
    "x is a list": (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "integer x": (dict(x=zeros(2, 3, 8, dtype=torch.long)), TypeError, "x must be of a floating dtype"),
    "x of no dimension": (dict(x=zeros()), ValueError, "even and at least 2, got 0"),
    "odd width": (dict(x=zeros(2, 3, 7)), ValueError, "RoAd turns pairs: the width must be even .* got 7"),
    "no such variant": (dict(variant=3), ValueError, "variant must be 1, 2 or 4, got 3"),
    "odd group": (dict(group=3), ValueError, "group must be even and at least 2, got 3"),
    "a group that does not divide": (dict(group=6), ValueError, "got group 6 and width 8"),
    "a head smaller than its group": (dict(group=4, head_dim=2), ValueError, "at least group=4 .* got head_dim 2"),
    "heads that do not divide": (dict(head_dim=6), ValueError, "divide the width, got head_dim 6 and width 8"),
    "too few angles": (dict(theta=zeros(4)), ValueError, r"theta must be \[8\] without an index \(variant 2, width 8"),
    "a table without an index": (TABLES, ValueError, r"theta must be \[8\] without an index .* got \[4, 8\]"),
    "an index without tables": (dict(index=index(0, 1)), ValueError, r"theta must be \[adapters, 8\] with an index"),
    "scales unlike angles": (dict(alpha=zeros(4)), ValueError, r"alpha must have theta's shape \[8\], got \[4\]"),
    "integer angles": (dict(theta=zeros(8, dtype=torch.long)), TypeError, "theta must be of a floating dtype"),
    "another device": (dict(alpha=zeros(8, device="meta")), ValueError, "alpha is on meta, but x is on cpu"),
    "index is a list": (dict(TABLES, index=[0, 1]), TypeError, "index must be a tensor, got list"),
    "index of int64": (dict(TABLES, index=index(0, 1).long()), TypeError, "index must be int32, got torch.int64"),
    "index of another length": (
        dict(TABLES, index=index(0)),
        ValueError,
        r"for each of x's sequences, \[2\].*got \[1\]",
    ),
    "index on another device": (dict(TABLES, index=index(0, 1, device="meta")), ValueError, "index is on meta, but x"),
    "index past the tables": (dict(TABLES, index=index(0, 4)), ValueError, "from 0 to 3, a row of the tables, got 4"),
    "index below 0": (dict(TABLES, index=index(-1, 0)), ValueError, "from 0 to 3, a row of the tables, got -1"),
    "unknown backend": (dict(backend="cuda"), ValueError, "must be one of triton, reference, got 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        road(**(dict(x=zeros(2, 3, 8), theta=zeros(8), alpha=zeros(8), variant=2) | change))

"""rope_road: the Triton backend against the float64 reference, its gradients, its promises, its errors."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from rosa_kernels import road, road_triton, rope_road, rope_road_fuses, rope_roae_reference
from rosa_kernels.road_reference import NUMBERS

VARIANTS = [1, 2, 4]


def make_inputs(
    *, variant, batch=2, heads=3, key_heads=2, seq=5, head_dim=8, rotary_dim=None, batch_cos=False, adapters=None,
    sequence_major=True, dtype=torch.float64, device="cpu",
):  # fmt: skip
    """q, k, cos and sin with one column a pair, (theta, alpha) of q and of k, and index."""

    def head_tensor(count):
        if sequence_major:
            return torch.randn(batch, seq, count, head_dim, dtype=dtype, device=device).transpose(1, 2)
        return torch.randn(batch, count, seq, head_dim, dtype=dtype, device=device)

    def angles(count):
        size = int(count * head_dim * NUMBERS[variant])
        return tuple(torch.randn(*tables, size, dtype=wide, device=device) for _ in range(2))

    tables, wide = () if adapters is None else (adapters,), torch.float64 if dtype == torch.float64 else torch.float32
    q, k = head_tensor(heads), head_tensor(key_heads)
    pairs = (rotary_dim or head_dim) // 2
    cos, sin = torch.randn(2, batch if batch_cos else 1, seq, pairs, dtype=dtype, device=device)
    index = None if adapters is None else (adapters - 1 - torch.arange(batch, device=device) % adapters).int()
    return q, k, cos, sin, angles(heads), angles(key_heads), index


def run(inputs, **options):
    """Outputs, and the gradients of a random projection of them to q, k and what angles and scales there are."""
    q, k, cos, sin, query, key, index = inputs
    q, k = (t.detach().requires_grad_() for t in (q, k))
    query, key = (w and tuple(t.detach().requires_grad_() for t in w) for w in (query, key))
    outputs = rope_road(q, k, cos, sin, query, key, index, rotary_dim=2 * cos.shape[-1], **options)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [q, k, *(query or ()), *(key or ())], directions)]


def relative_errors(values, exact):
    return [((v.double() - e).norm() / e.norm()).item() for v, e in zip(values, exact, strict=True)]


# RoAd's pairs are the rotary pairs in either layout, neighbours in the half layout, with and without a rest of the
# head, or none of these: then `road` goes before. Head sizes that are no power of two, one key head, cos of every
# batch, both memory layouts, adapters.
CASES = {
    "rotary pairs, half layout": dict(group=8),
    "rotary pairs, interleaved, adapters": dict(interleaved=True, adapters=3, batch=3, heads=1, key_heads=1),
    "neighbours in the half layout": dict(),
    "neighbours in the half layout, adapters": dict(adapters=2, heads=2, key_heads=1, batch_cos=True),
    "rotary pairs, partial": dict(group=4, roads_head_dim=10, head_dim=10, rotary_dim=4, adapters=2, key_heads=1),
    "rotary pairs, partial, interleaved": dict(interleaved=True, head_dim=12, rotary_dim=6, heads=2, key_heads=1),
    "neighbours, partial": dict(head_dim=18, rotary_dim=12, heads=1, key_heads=2, sequence_major=False),
    "one rotary pair": dict(head_dim=4, rotary_dim=2, adapters=2),
    "head of 80": dict(head_dim=80, rotary_dim=32, heads=1, key_heads=1, seq=2),
    "head of 24, head-major": dict(group=24, head_dim=24, sequence_major=False, heads=1, key_heads=1, batch_cos=True),
    "one token": dict(batch=1, seq=1, adapters=2),
    "apart: peft's groups": dict(group=4, adapters=2, heads=2),
    "apart: neighbours across the halves": dict(head_dim=6, heads=2, key_heads=1),
    "apart: pairs across heads": dict(head_dim=5, rotary_dim=4, heads=2, key_heads=2),
    "apart: halves, interleaved rotation": dict(group=8, interleaved=True, heads=1, key_heads=1),
}


def of_case(case, variant, device, **changes):
    """The inputs of a case, and the options of `rope_road` that it stands for."""
    case = {**case, **changes}
    options = {name: case.pop(name) for name in ("group", "interleaved") if name in case}
    if "roads_head_dim" in case:
        options["head_dim"] = case.pop("roads_head_dim")
    return make_inputs(**case, variant=variant, device=device), dict(variant=variant, **options)


def fuses(inputs, *, variant, **options):
    return rope_road_fuses(inputs[0].shape[-1], rotary_dim=2 * inputs[2].shape[-1], **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_triton_computes_what_the_reference_computes_in_float64(kernel_device, name, variant):
    inputs, options = of_case(CASES[name], variant, kernel_device)
    assert fuses(inputs, **options) == (not name.startswith("apart"))
    ours, exact = (run(inputs, **options, backend=backend) for backend in ("triton", "reference"))
    assert max(relative_errors(ours, exact)) < 1e-13


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["rotary pairs, half layout", "neighbours in the half layout, adapters"])
def test_queries_or_keys_alone_and_neither(kernel_device, name, variant):
    (q, k, cos, sin, query, key, index), options = of_case(CASES[name], variant, kernel_device)
    for weights in ((query, None), (None, key), (None, None)):
        inputs = (q, k, cos, sin, *weights, index)
        ours, exact = (run(inputs, **options, backend=backend) for backend in ("triton", "reference"))
        assert max(relative_errors(ours, exact)) < 1e-13
    nothing = q[:, :0]
    alone = [rope_road(q, nothing, cos, sin, query, None, index, rotary_dim=8, **options, backend="triton")[0]]
    alone += [rope_road(nothing, k, cos, sin, None, key, index, rotary_dim=8, **options, backend="triton")[1]]
    together = rope_road(q, k, cos, sin, query, key, index, rotary_dim=8, **options, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_it_is_road_and_then_the_rotation(kernel_device):
    q, k, cos, sin, query, key, _ = make_inputs(variant=2, device=kernel_device)
    flat = [x.transpose(1, 2).flatten(2) for x in (q, k)]
    turned = [road(x, *w, variant=2, group=8) for x, w in zip(flat, (query, key), strict=True)]
    turned = [x.unflatten(2, (-1, 8)).transpose(1, 2) for x in turned]
    silent = [q.new_zeros(2, 5, 2 * count) for count in (3, 2)]
    expected = rope_roae_reference(*turned, cos, sin, *silent, rotary_dim=8)
    ours = rope_road(q, k, cos, sin, query, key, variant=2, group=8, rotary_dim=8, backend="triton")
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("programs", [1, 6])
@pytest.mark.parametrize("adapters", [None, 2])
def test_however_the_tokens_are_divided_among_programs(kernel_device, monkeypatch, adapters, programs):
    monkeypatch.setattr("rosa_kernels.rope_road_triton.MAX_BLOCK_T", 2)
    monkeypatch.setattr(road_triton, "PROGRAMS", programs)
    for options in (dict(variant=1), dict(variant=2, group=4)):
        inputs = make_inputs(
            variant=options["variant"], heads=1, key_heads=1, seq=7, head_dim=4, adapters=adapters, batch_cos=True,
            device=kernel_device,
        )  # fmt: skip
        ours, exact = (run(inputs, **options, backend=backend) for backend in ("triton", "reference"))
        assert max(relative_errors(ours, exact)) < 1e-13


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(kernel_device, backend, variant):
    q, k, cos, sin, query, _, index = make_inputs(
        variant=variant, batch=1, heads=1, key_heads=0, seq=1, head_dim=4, adapters=1, device=kernel_device
    )
    options = dict(variant=variant, rotary_dim=4, backend=backend)
    leaves = [t.requires_grad_() for t in (q, *query)]

    def op(q, *query):
        return rope_road(q, k, cos, sin, query, None, index, **options)[0]

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [2, 16], ids=["neighbours", "rotary pairs"])
def test_16_bit_error_is_no_larger_than_that_of_the_same_mathematics_in_eager(kernel_device, dtype, variant, group):
    q, k, cos, sin, query, key, _ = make_inputs(
        variant=variant, seq=33, heads=2, key_heads=1, head_dim=16, dtype=dtype, device=kernel_device
    )
    query, key = ((theta, 1 + 0.1 * alpha) for theta, alpha in (query, key))
    inputs = (q, k, cos, sin, query, key, None)
    exact = run(tuple(_map(inputs, torch.Tensor.double)), variant=variant, group=group, backend="reference")
    ours = relative_errors(run_and_round(inputs, variant, group), exact)
    eager = relative_errors(run_eager(inputs, variant, group), exact)
    if dtype != torch.float32:  # in float32 both round as they compute, and neither is nearer
        assert all(o <= e for o, e in zip(ours, eager, strict=True)), (ours, eager)
    assert max(ours) < {torch.float32: 5e-7, torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]


def _map(inputs, function):
    return [t if t is None else tuple(map(function, t)) if isinstance(t, tuple) else function(t) for t in inputs]


def run_and_round(inputs, variant, group):
    """`run` on the Triton backend. Triton's interpreter truncates to bfloat16, where a GPU rounds to nearest: there the
    kernel computes on the same values in float32, as it does inside, and torch rounds."""
    options = dict(variant=variant, group=group, backend="triton")
    if not inputs[0].is_cuda and inputs[0].dtype == torch.bfloat16:
        q_out, k_out, dq, dk, *grads = run(tuple(_map(inputs, torch.Tensor.float)), **options)
        return [*(t.bfloat16() for t in (q_out, k_out, dq, dk)), *grads]
    return run(inputs, **options)


def run_eager(inputs, variant, group):
    """RoAd as it is written without a kernel, two vectors in q's dtype, and the rotary function of a model."""
    q, k, cos, sin, query, key, _ = inputs
    leaves = [t.detach().requires_grad_() for t in (q, k, *query, *key)]

    def rotate_half(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    def adapt_and_rotate(x, theta, alpha):
        heads, width = x.shape[1], x.shape[1] * x.shape[3]
        angles, scales = theta, alpha
        if variant == 1:
            angles, scales = (
                t.repeat_interleave(2) if group == 2 else torch.cat((t.view(heads, -1),) * 2, -1).flatten()
                for t in (theta, alpha)
            )
        angles, scales = (t if variant == 4 else t.repeat(2) for t in (angles, scales))
        first = (scales[:width] * angles[:width].cos()).to(x.dtype).view(heads, 1, -1)
        second = (scales[width:] * angles[width:].sin()).to(x.dtype).view(heads, 1, -1)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) if group == 2 else rotate_half(x)
        x = first * x + second * turned
        c, s = (torch.cat((t, t), -1).to(x.dtype).unsqueeze(1) for t in (cos, sin))
        return x * c + rotate_half(x) * s

    outputs = adapt_and_rotate(leaves[0], *leaves[2:4]), adapt_and_rotate(leaves[1], *leaves[4:])
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, directions)]


@pytest.mark.parametrize("sequence_major", [True, False])
def test_outputs_and_gradients_keep_dtype_and_layout_and_inputs_are_untouched(kernel_device, sequence_major):
    inputs = make_inputs(variant=2, sequence_major=sequence_major, dtype=torch.bfloat16, device=kernel_device)
    before = [t.clone() for t in inputs[:4]]
    q_out, k_out, dq, dk, *grads = run(inputs, variant=2, backend="triton")
    for ours, theirs in ((q_out, inputs[0]), (k_out, inputs[1]), (dq, inputs[0]), (dk, inputs[1])):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    assert all(g.dtype == torch.float32 for g in grads)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_strides(kernel_device, variant):
    _, k, cos, sin, query, key, _ = make_inputs(variant=variant, key_heads=3, device=kernel_device)
    strided = torch.randn(2, 8, 5, 6, dtype=torch.float64, device=kernel_device).permute(0, 3, 2, 1)[:, ::2]
    expanded = k[:, :1].expand(-1, 3, -1, -1)
    query = tuple(torch.stack((t, t), -1)[..., 0] for t in query)
    inputs = (strided, expanded, cos.expand(2, -1, -1), sin.flip(-1).expand(2, -1, -1), query, key, None)
    ours, exact = (run(inputs, variant=variant, backend=backend) for backend in ("triton", "reference"))
    assert max(relative_errors(ours, exact)) < 1e-13


class Operators(TorchDispatchMode):
    """The operators that run, by name, and the sizes, in elements, of what the launches return."""

    def __enter__(self):
        self.names, self.sizes = [], []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "detach" not in function._schema.name:
            self.names.append(function._schema.name)
        if function.namespace == "rosa":
            self.sizes += [t.numel() for t in out]
        return out


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("wanted", [(0,), (0, 1), (2,), (5,), (3, 4)], ids=str)
def test_only_the_gradients_asked_for(kernel_device, variant, wanted):
    inputs = make_inputs(variant=variant, device=kernel_device)
    everything = run(inputs, variant=variant, group=8, backend="triton")[2:]
    q, k, cos, sin, query, key, _ = inputs
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate((q, k, *query, *key))]
    with Operators() as forward:
        outputs = rope_road(
            leaves[0], leaves[1], cos, sin, leaves[2:4], leaves[4:], variant=variant, group=8, rotary_dim=8,
            backend="triton",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    with Operators() as backward:
        torch.autograd.backward(outputs, directions)
    for i, (leaf, expected) in enumerate(zip(leaves, everything, strict=True)):
        assert (leaf.grad is not None) == (i in wanted)
        assert leaf.grad is None or torch.equal(leaf.grad, expected)
    adapts = max(wanted) > 1
    assert forward.names == ["rosa::rope_road_forward"]
    assert backward.names == ["rosa::rope_road_backward"] + ["rosa::road_reduce"] * adapts
    columns = sum(w * 8 // (2 if variant == 1 else 1) for w, at in ((3, (2, 3)), (2, (4, 5))) if {*wanted} & {*at})
    sizes = [t.numel() if i in wanted else 0 for i, t in enumerate(leaves)]
    assert backward.sizes == sizes[:2] + [2 * columns] + sizes[2:] * adapts  # one row: all tokens are one block


def test_no_copies_inside_the_launches(kernel_device):
    from rosa_kernels.rope_road_triton import backward_launch, forward_launch

    q, k, cos, sin, query, key, index = make_inputs(
        variant=2, adapters=2, batch_cos=True, dtype=torch.bfloat16, device=kernel_device
    )
    with Operators() as inside:
        outputs = forward_launch(q, k, cos, sin, index, *query, *key, 2, True, False).outputs
        backward_launch(*outputs, cos, sin, index, *query, *key, q, k, 2, True, False, True, True, True)
    allocate_or_view = {"aten::new_empty", "aten::empty_like", "aten::view", "aten::_reshape_alias", "aten::transpose"}
    assert set(inside.names) <= allocate_or_view


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trained", [(), ("query",), ("query", "key")], ids=["frozen", "query", "both"])
def test_saves_its_outputs_for_variant_1_and_its_inputs_for_the_others(kernel_device, variant, trained):
    q, k, cos, sin, query, key, index = make_inputs(variant=variant, adapters=2, device=kernel_device)
    q.requires_grad_()
    for name, weights in (("query", query), ("key", key)):
        for t in weights:
            t.requires_grad_(name in trained)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        outputs = rope_road(q, k, cos, sin, query, key, index, variant=variant, rotary_dim=8, backend="triton")
    kept = (outputs if variant == 1 else (q, k))[: len(trained)]
    small = (cos, sin, index, *query, *key)
    assert sorted(saved) == sorted(t.data_ptr() for t in (*small, *kept))


@pytest.mark.parametrize("group", [2, 8], ids=["neighbours", "rotary pairs"])
def test_a_scale_of_zero_gets_no_gradient_from_variant_1_and_spoils_none(kernel_device, group):
    inputs = make_inputs(variant=1, device=kernel_device)
    inputs[4][1][3] = inputs[5][1][0] = 0
    ours, exact = (run(inputs, variant=1, group=group, backend=b) for b in ("triton", "reference"))
    assert ours[5][3] == ours[7][0] == 0
    exact[5][3] = exact[7][0] = 0
    assert max(relative_errors(ours, exact)) < 1e-13


@pytest.mark.parametrize("group", [2, 8], ids=["neighbours", "rotary pairs"])
def test_a_pair_that_rope_sets_to_zero_spoils_nothing(kernel_device, group):
    inputs = make_inputs(variant=1, device=kernel_device)
    inputs[2][0, 0, 1] = inputs[3][0, 0, 1] = 0
    ours, exact = (run(inputs, variant=1, group=group, backend=b) for b in ("triton", "reference"))
    assert all(t.isfinite().all() for t in ours)
    whole = slice(None) if group == 8 else slice(0, 4)  # of neighbours the output no longer tells both elements
    assert max(relative_errors(ours[whole], exact[whole])) < 1e-13


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("group", [2, 4], ids=["one launch", "apart"])
def test_compiles_into_one_graph_with_equal_gradients(kernel_device, backend, group):
    q, k, cos, sin, query, key, index = make_inputs(variant=2, adapters=2, dtype=torch.float32, device=kernel_device)
    torch.compiler.reset()
    leaves = [t.detach().requires_grad_() for t in (q, k, *query, *key)]

    def loss(q, k, *weights):
        options = dict(variant=2, group=group, rotary_dim=8, backend=backend)
        a, b = rope_road(q, k, cos, sin, weights[:2], weights[2:], index, **options)
        return a.square().sum() + b.sin().sum()

    grads = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grads, torch.autograd.grad(compiled(*leaves), leaves))


def test_double_backward_is_refused_by_name(kernel_device):
    q, k, cos, sin, query, key, _ = make_inputs(variant=1, device=kernel_device)
    out = rope_road(q.requires_grad_(), k, cos, sin, query, key, variant=1, rotary_dim=8, backend="triton")[0]
    with pytest.raises(RuntimeError, match=r"rope_road's Triton.*no double backward.*backend='reference'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize("group", [2, 4], ids=["one launch", "apart"])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_not_dropped(kernel_device, grad, group):
    q, k, cos, sin, query, key, _ = make_inputs(variant=2, device=kernel_device)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        theta = forward_ad.make_dual(key[0], torch.ones_like(key[0]))
        with pytest.raises(RuntimeError, match=r"road's Triton.*no forward mode.*backend='reference'"):
            rope_road(q, k, cos, sin, query, (theta, key[1]), variant=2, group=group, rotary_dim=8, backend="triton")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_index_that_nothing_reads_is_ignored(kernel_device, backend):
    q, k, cos, sin, *_ = make_inputs(variant=2, device=kernel_device)
    plain, indexed = (
        rope_road(q, k, cos, sin, None, None, index, variant=2, rotary_dim=8, backend=backend)
        for index in (None, torch.zeros(3, device="meta"))
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, indexed, strict=True))


@pytest.mark.parametrize("group", [2, 4], ids=["one launch", "apart"])
def test_an_index_of_any_stride(kernel_device, group):
    *inputs, index = make_inputs(variant=2, batch=3, adapters=3, device=kernel_device)
    inputs.append(index.repeat_interleave(2)[::2])
    ours, exact = (run(inputs, variant=2, group=group, backend=backend) for backend in ("triton", "reference"))
    assert max(relative_errors(ours, exact)) < 1e-13


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("adapters", [None, 2])
def test_empty_batch(kernel_device, adapters, backend):
    inputs = make_inputs(variant=2, batch=0, adapters=adapters, device=kernel_device)
    q_out, _, _, _, *grads = run(inputs, variant=2, backend=backend)
    assert q_out.shape == (0, 3, 5, 8) and not any(g.any() for g in grads)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_that_reads_the_adapters_anew():
    q, k, cos, sin, query, key, index = make_inputs(variant=1, adapters=2, dtype=torch.bfloat16, device="cuda")
    options = dict(variant=1, rotary_dim=8)
    rope_road(q, k, cos, sin, query, key, index, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rope_road(q, k, cos, sin, query, key, index, **options)
    index.copy_(1 - index)
    graph.replay()
    expected = rope_road(q, k, cos, sin, query, key, index, **options)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_which_pairings_are_one_launch_is_known_without_triton():
    program = """
import sys
sys.modules["triton"] = None
from rosa_kernels import rope_road_fuses
print(rope_road_fuses(128), rope_road_fuses(128, group=64), rope_road_fuses(128, group=128),
      rope_road_fuses(80, group=32, head_dim=80, rotary_dim=32), rope_road_fuses(128, group=128, interleaved=True),
      rope_road_fuses(6), rope_road_fuses(6, interleaved=True), rope_road_fuses(128, group=64, rotary_dim=64))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False", "True", "True", "False", "False", "True", "False"], done.stderr


def zeros(*shape, **options):
    return torch.zeros(shape, **{"dtype": torch.float64, **options})


def pair(*shape):
    return zeros(*shape), zeros(*shape)


# What is changed in q [2, 3, 5, 8], k [2, 2, 5, 8], cos and sin [1, 5, 8], query [24], key [16], of variant 2.
TABLES = dict(query=pair(4, 24), key=pair(4, 16), index=torch.zeros(2, dtype=torch.int32))
BAD_INPUTS = {
    "q of three dimensions": (dict(q=zeros(2, 5, 8)), ValueError, r"q must have the shape \[batch, heads"),
    "cos of another length": (dict(cos=zeros(1, 6, 8)), ValueError, r"cos must be \[1 or 2, 5, 8\]"),
    "no such variant": (dict(variant=3), ValueError, "variant must be 1, 2 or 4, got 3"),
    "a group that divides queries only": (dict(group=24), ValueError, "got group 24 and width 16"),
    "query is one tensor": (dict(query=zeros(24)), TypeError, "query must be a pair of tensors, theta and alpha"),
    "too few angles": (dict(query=pair(12)), ValueError, r"query's theta must be \[24\] without an index"),
    "scales unlike angles": (
        dict(key=(zeros(16), zeros(8))),
        ValueError,
        r"key's alpha must have key's theta's shape \[16\], got \[8\]",
    ),
    "integer angles": (
        dict(key=(zeros(16, dtype=torch.long), zeros(16))),
        TypeError,
        "key's theta must be of a floating dtype",
    ),
    "tables without an index": (
        TABLES | dict(index=None),
        ValueError,
        r"query's theta must be \[24\] without an index",
    ),
    "unlike tables": (TABLES | dict(key=pair(3, 16)), ValueError, "tables of as many adapters, got [34] and [34]"),
    "index past the tables": (
        TABLES | dict(index=torch.tensor([0, 4], dtype=torch.int32)),
        ValueError,
        "from 0 to 3, a row of the tables, got 4",
    ),
    "index of another length": (TABLES | dict(index=torch.zeros(3, dtype=torch.int32)), ValueError, "each of q's seq"),
    "unknown backend": (dict(backend="cuda"), ValueError, "must be one of triton, reference, got 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_named(change, error, message):
    arguments = dict(q=zeros(2, 3, 5, 8), k=zeros(2, 2, 5, 8), cos=zeros(1, 5, 8), sin=zeros(1, 5, 8))
    with pytest.raises(error, match=message):
        rope_road(**(arguments | dict(query=pair(24), key=pair(16), variant=2) | change))

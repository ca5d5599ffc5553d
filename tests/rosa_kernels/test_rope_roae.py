"""rope_roae: the Triton backend against the float64 reference, its gradients, its promises, its errors."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import rosa_kernels
from rosa_kernels import rope_roae, rope_roae_reference


def make_inputs(
    *, batch=2, heads=4, key_heads=2, seq=5, head_dim=16, rotary_dim=None, low_pairs=2, interleaved=False,
    batch_cos=False, shared=False, sequence_major=True, dtype=torch.float64, cos_dtype=None, device="cpu",
):  # fmt: skip
    """q, k, cos, sin, signal, key_signal; q and k laid out as Hugging Face's transposed projections, or not."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim

    def head_tensor(count):
        if sequence_major:
            return torch.randn(batch, seq, count, head_dim, dtype=dtype, device=device).transpose(1, 2)
        return torch.randn(batch, count, seq, head_dim, dtype=dtype, device=device)

    def rotary(values):
        return values.repeat_interleave(2, -1) if interleaved else torch.cat((values, values), -1)

    q, k = head_tensor(heads), head_tensor(key_heads)
    cos, sin = (
        rotary(torch.randn(batch if batch_cos else 1, seq, rotary_dim // 2, dtype=cos_dtype or dtype, device=device))
        for _ in range(2)
    )
    signal = torch.randn(batch, seq, heads * 2 * low_pairs, dtype=dtype, device=device)
    key_signal = torch.randn(batch, seq, key_heads * 2 * low_pairs, dtype=dtype, device=device)
    return q, k, cos, sin, signal, None if shared else key_signal


def run(inputs, **options):
    """Outputs, and the gradients of a random projection of them to q, k, signal and key_signal."""
    q, k, cos, sin, signal, key_signal = inputs
    leaves = [None if t is None else t.detach().requires_grad_() for t in (q, k, signal, key_signal)]
    outputs = rope_roae(leaves[0], leaves[1], cos, sin, *leaves[2:], **options)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, [t for t in leaves if t is not None], directions)
    return [*outputs, *grads]


def relative_errors(values, exact):
    return [((v.double() - e).norm() / e.norm()).item() for v, e in zip(values, exact, strict=True)]


# Head sizes that are no power of two, one key head, as many key heads as query heads with and without a signal of their
# own, partial rotary, one pair, all pairs, one token, tokens just past a block, and both memory layouts.
CASES = {
    "grouped": dict(heads=4, key_heads=2),
    "multi-query": dict(heads=5, key_heads=1, seq=7),
    "shared signal": dict(heads=3, key_heads=3, shared=True),
    "keys with their own signal": dict(heads=3, key_heads=3),
    "more key heads than query heads": dict(heads=1, key_heads=3),
    "head of 80": dict(head_dim=80, low_pairs=10, seq=3),
    "head of 96, partial rotary": dict(head_dim=96, rotary_dim=24, low_pairs=3, seq=3),
    "head of 112": dict(head_dim=112, low_pairs=14, seq=2),
    "head of 512": dict(head_dim=512, low_pairs=64, seq=2, heads=2, key_heads=1),
    "one pair": dict(head_dim=2, low_pairs=1),
    "every pair": dict(low_pairs=8),
    "one token": dict(batch=1, seq=1),
    "tokens past a block": dict(batch=3, seq=43, heads=2, key_heads=1),
    "cos of every batch": dict(batch_cos=True, seq=6),
    "interleaved": dict(interleaved=True),
    "interleaved, partial, cos of every batch": dict(
        interleaved=True, head_dim=20, rotary_dim=12, batch_cos=True, low_pairs=1
    ),
    "head-major": dict(sequence_major=False, batch_cos=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_triton_computes_what_the_reference_computes_in_float64(kernel_device, case):
    inputs = make_inputs(**case, device=kernel_device)
    interleaved = case.get("interleaved", False)
    ours = run(inputs, alpha=0.7, interleaved=interleaved, backend="triton")
    exact = run(inputs, alpha=0.7, interleaved=interleaved, backend="reference")
    assert max(relative_errors(ours, exact)) < 1e-14


@pytest.mark.parametrize("name", ["grouped", "shared signal", "head of 80", "interleaved, partial, cos of every batch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_signals_that_are_not_finite_spoil_what_they_do_in_the_reference(kernel_device, name, bad):
    options = dict(alpha=0.7, interleaved=CASES[name].get("interleaved", False))
    for columns in (slice(None), 0):
        inputs = make_inputs(**CASES[name], device=kernel_device)
        for signal in inputs[4:]:
            if signal is not None:
                signal[0, -1, columns] = bad
        ours, exact = (run(inputs, backend=backend, **options) for backend in ("triton", "reference"))
        for value, other in zip(ours, exact, strict=True):
            assert torch.equal(value.isnan(), other.isnan())
        assert not all(value.isfinite().all() for value in exact[:2])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 4), key_heads=st.integers(1, 4), seq=st.integers(1, 40),
    pairs=st.integers(1, 40), rest=st.integers(0, 9), low=st.floats(0, 1), interleaved=st.booleans(),
    batch_cos=st.booleans(), sequence_major=st.booleans(), shared=st.booleans(),
)  # fmt: skip
def test_triton_equals_reference_at_any_shape(
    kernel_device, batch, heads, key_heads, seq, pairs, rest, low, interleaved, batch_cos, sequence_major, shared
):
    inputs = make_inputs(
        batch=batch, heads=heads, key_heads=heads if shared else key_heads, seq=seq, head_dim=2 * pairs + rest,
        rotary_dim=2 * pairs, low_pairs=max(1, int(low * pairs)), interleaved=interleaved, batch_cos=batch_cos,
        sequence_major=sequence_major, shared=shared, device=kernel_device,
    )  # fmt: skip
    ours = run(inputs, interleaved=interleaved, backend="triton")
    assert max(relative_errors(ours, run(inputs, interleaved=interleaved, backend="reference"))) < 1e-13


@pytest.mark.parametrize(
    "case",
    [
        dict(batch=1, heads=2, key_heads=1, seq=2, head_dim=4, low_pairs=1),
        dict(batch=1, heads=2, key_heads=2, seq=2, head_dim=4, low_pairs=2, shared=True),
        dict(batch=2, heads=2, key_heads=1, seq=1, head_dim=7, rotary_dim=4, low_pairs=1, batch_cos=True),
        dict(batch=1, heads=2, key_heads=1, seq=2, head_dim=6, low_pairs=1, interleaved=True, sequence_major=False),
    ],
    ids=["grouped", "shared signal", "partial rotary, batch cos", "interleaved, head-major"],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradcheck(kernel_device, case, backend):
    q, k, cos, sin, signal, key_signal = make_inputs(**case, device=kernel_device)
    leaves = [None if t is None else t.requires_grad_() for t in (q, k, signal, key_signal)]

    def op(q, k, *signals):
        options = dict(alpha=0.7, interleaved=case.get("interleaved", False), backend=backend)
        return rope_roae(q, k, cos, sin, *signals, **options)

    assert torch.autograd.gradcheck(op, [t for t in leaves if t is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cos_dtype", [None, torch.float32], ids=["cos alike", "float32 cos"])
def test_16_bit_error_is_no_larger_than_that_of_the_same_mathematics_in_eager(kernel_device, dtype, cos_dtype):
    exact_inputs = make_inputs(seq=33, heads=4, key_heads=2, head_dim=32, low_pairs=4, device=kernel_device)
    inputs = tuple(t.to(dtype) for t in exact_inputs)
    if cos_dtype:
        inputs = (*inputs[:2], inputs[2].to(cos_dtype), inputs[3].to(cos_dtype), *inputs[4:])
    exact = run(tuple(t.double() for t in inputs), backend="reference")
    ours = relative_errors(run_and_round(inputs), exact)
    eager = relative_errors(run_eager(inputs), exact)
    if dtype != torch.float32:  # in float32 both round as they compute, and neither is nearer
        assert all(o <= e for o, e in zip(ours, eager, strict=True)), (ours, eager)
    assert max(ours) < {torch.float32: 3e-7, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]


def run_and_round(inputs):
    """`run` on the Triton backend. Triton's interpreter truncates to bfloat16, where a GPU rounds to nearest: there the
    kernel computes on the same values in float32, as it does inside, and torch rounds."""
    if not inputs[0].is_cuda and inputs[0].dtype == torch.bfloat16:
        return [t.bfloat16() for t in run(tuple(t.float() for t in inputs), backend="triton")]
    return run(inputs, backend="triton")


def run_eager(inputs):
    """Eq. 4 written the way a model is: operation by operation, each rounding to the tensors' dtype."""
    q, k, cos, sin, signal, key_signal = inputs
    leaves = [t.detach().requires_grad_() for t in (q, k, signal, key_signal)]

    def rotate_half(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    def enhance(x, s):
        c, sn = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
        x = x * c + rotate_half(x) * sn
        half, n = x.shape[-1] // 2, s.shape[-1] // x.shape[1] // 2
        low = torch.cat((torch.arange(half - n, half), torch.arange(2 * half - n, 2 * half))).to(x.device)
        z = x[..., low]
        s = s.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
        return x.index_copy(-1, low, z + z * (0.1 * s))

    outputs = enhance(leaves[0], torch.nn.functional.silu(leaves[2])), enhance(leaves[1], leaves[3])
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, directions)]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("sequence_major", [True, False])
def test_outputs_and_gradients_keep_dtype_and_layout_and_inputs_are_untouched(kernel_device, backend, sequence_major):
    inputs = make_inputs(sequence_major=sequence_major, dtype=torch.bfloat16, device=kernel_device)
    before = [t.clone() for t in inputs]
    q_out, k_out, dq, dk, *_ = run(inputs, backend=backend)
    for ours, theirs in ((q_out, inputs[0]), (k_out, inputs[1]), (dq, inputs[0]), (dk, inputs[1])):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if backend == "triton" or ours is q_out or ours is k_out:
            assert ours.stride() == theirs.stride()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1)])
def test_queries_and_keys_apart_are_what_they_are_together(kernel_device, backend, heads, key_heads):
    q, k, cos, sin, signal, key_signal = make_inputs(heads=heads, key_heads=key_heads, device=kernel_device)
    nothing, no_signal = q[:, :0], signal[..., :0]
    directions = [torch.randn_like(q), torch.randn_like(k)]
    leaves = [t.detach().requires_grad_() for t in (q, k, signal, key_signal)]
    together = rope_roae(leaves[0], leaves[1], cos, sin, *leaves[2:], backend=backend)
    q_alone, no_keys = rope_roae(leaves[0], nothing, cos, sin, leaves[2], no_signal, backend=backend)
    no_queries, k_alone = rope_roae(nothing, leaves[1], cos, sin, no_signal, leaves[3], backend=backend)
    assert no_keys.shape[1] == no_queries.shape[1] == 0
    assert torch.equal(q_alone, together[0]) and torch.equal(k_alone, together[1])
    expected = torch.autograd.grad(together, leaves, directions)
    for ours, theirs in zip(torch.autograd.grad((q_alone, k_alone), leaves, directions), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_any_strides(kernel_device):
    _, k, cos, sin, signal, key_signal = make_inputs(device=kernel_device)
    strided = torch.randn(2, 16, 5, 8, dtype=torch.float64, device=kernel_device).permute(0, 3, 2, 1)[:, ::2]
    expanded = k[:, :1].expand(-1, 2, -1, -1)
    inputs = (strided, expanded, cos.expand(2, -1, -1), sin.flip(-1).expand(2, -1, -1), signal, key_signal)
    assert max(relative_errors(run(inputs, backend="triton"), run(inputs, backend="reference"))) < 1e-14


def test_signals_of_any_strides(kernel_device):
    q, k, cos, sin, signal, key_signal = make_inputs(batch=1, device=kernel_device)
    columns = torch.randn(1, 5, 32, dtype=torch.float64, device=kernel_device)[..., ::2]
    transposed = torch.randn(1, 8, 5, dtype=torch.float64, device=kernel_device).transpose(1, 2)
    for signals in ((columns, key_signal), (signal, transposed)):
        outputs = [rope_roae(q, k, cos, sin, *signals, backend=b) for b in ("triton", "reference")]
        assert max(relative_errors(*outputs)) < 1e-14


def test_cos_of_half_the_width(kernel_device):
    q, k, cos, sin, signal, key_signal = make_inputs(head_dim=16, device=kernel_device)
    half = (q, k, cos[..., :8], sin[..., :8], signal, key_signal)
    for backend in ("triton", "reference"):
        full = run((q, k, cos, sin, signal, key_signal), backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(full, run(half, rotary_dim=16, backend=backend), strict=True))


def test_only_the_gradients_asked_for(kernel_device):
    everything = run(make_inputs(device=kernel_device), backend="triton")[2:]
    torch.manual_seed(0)
    for wanted in range(4):
        torch.manual_seed(0)
        q, k, cos, sin, signal, key_signal = make_inputs(device=kernel_device)
        leaves = [t.detach() for t in (q, k, signal, key_signal)]
        leaves[wanted].requires_grad_()
        outputs = rope_roae(leaves[0], leaves[1], cos, sin, *leaves[2:], backend="triton")
        generator = torch.Generator().manual_seed(1)
        directions = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
        torch.autograd.backward(
            [o for o in outputs if o.requires_grad], directions[: sum(o.requires_grad for o in outputs)]
        )
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(4)]
        assert torch.equal(leaves[wanted].grad, everything[wanted])


def saved_bytes(function):
    storages = {}

    def pack(t):
        storages[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(storages.values())


def test_saves_the_signals_and_the_low_pairs_and_under_no_grad_nothing(kernel_device):
    q, k, cos, sin, signal, key_signal = make_inputs(dtype=torch.bfloat16, device=kernel_device)

    def forward():
        return rope_roae(q, k, cos[..., :8], sin[..., :8], signal, key_signal, rotary_dim=16, backend="triton")

    tokens, low_pairs_of_all_heads = 2 * 5, (4 + 2) * 4
    rotary = cos[..., :8].numel() + sin[..., :8].numel()
    low_pairs = tokens * low_pairs_of_all_heads
    q.requires_grad_()
    assert saved_bytes(forward) == 2 * (rotary + signal.numel() + key_signal.numel())
    signal.requires_grad_()
    assert saved_bytes(forward) == 2 * (rotary + signal.numel() + key_signal.numel() + low_pairs)
    with Operators() as training:
        forward()
    with torch.no_grad(), Operators() as inference:
        assert not forward()[0].requires_grad
    assert training.sizes == [q.numel(), k.numel(), low_pairs] and inference.sizes == [q.numel(), k.numel(), 0]
    with torch.no_grad():
        assert saved_bytes(forward) == 0


class Operators(TorchDispatchMode):
    """The operators that run, by name, and the sizes, in elements, of what the launches return."""

    def __enter__(self):
        self.names, self.sizes = [], []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name)
        if function.namespace == "rosa":
            self.sizes += [t.numel() for t in out]
        return out


def test_one_launch_forward_and_one_backward_and_no_copies(kernel_device):
    from rosa_kernels.rope_roae_triton import backward_launch, forward_launch

    q, k, cos, sin, signal, key_signal = make_inputs(dtype=torch.bfloat16, batch_cos=True, device=kernel_device)
    leaves = [t.requires_grad_() for t in (q, k, signal, key_signal)]
    with Operators() as forward:
        outputs = rope_roae(q, k, cos, sin, signal, key_signal, backend="triton")
    assert sorted(forward.names) == ["aten::slice", "aten::slice", "rosa::rope_roae_forward"]
    directions = [torch.ones_like(o) for o in outputs]
    with Operators() as backward:
        torch.autograd.grad(outputs, leaves, directions)
    assert [name for name in backward.names if "detach" not in name] == ["rosa::rope_roae_backward"]

    rotary = (cos[..., :8], sin[..., :8], signal, key_signal)
    with Operators() as inside, torch.no_grad():
        low = forward_launch(q, k, *rotary, 0.1, False, True).outputs[-1]
        backward_launch(*directions, *rotary, low, 0.1, False, True, [True] * 4)
    allocate_or_view = {"aten::new_empty", "aten::empty_like", "aten::view", "aten::_reshape_alias", "aten::transpose"}
    assert set(inside.names) <= allocate_or_view


def test_autocast_changes_nothing(kernel_device):
    inputs = make_inputs(dtype=torch.float32, device=kernel_device)
    plain = run(inputs, backend="triton")
    with torch.autocast(kernel_device, torch.bfloat16):
        inside = run(inputs, backend="triton")
        half_signal = rope_roae(*inputs[:4], inputs[4].bfloat16(), inputs[5].bfloat16(), backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
    assert half_signal[0].dtype == torch.float32  # autocast's GEMMs give a 16-bit signal to 32-bit queries


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph_with_equal_gradients(kernel_device, backend):
    inputs = make_inputs(dtype=torch.float32, device=kernel_device)
    torch.compiler.reset()
    leaves = [t.detach().requires_grad_() for t in (inputs[0], inputs[1], inputs[4], inputs[5])]

    def loss(q, k, signal, key_signal):
        a, b = rope_roae(q, k, inputs[2], inputs[3], signal, key_signal, backend=backend)
        return a.square().sum() + b.sin().sum()

    grads = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, compiled, strict=True))


def test_double_backward_is_refused_by_name(kernel_device):
    q, k, cos, sin, signal, key_signal = make_inputs(device=kernel_device)
    q.requires_grad_()
    out = rope_roae(q, k, cos, sin, signal, key_signal, backend="triton")[0]
    with pytest.raises(RuntimeError, match=r"no double backward.*backend='reference'"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_not_dropped(kernel_device, grad):
    *inputs, key_signal = make_inputs(device=kernel_device)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        inputs.append(forward_ad.make_dual(key_signal, torch.ones_like(key_signal)))
        with pytest.raises(RuntimeError, match=r"rope_roae's Triton.*no forward mode.*backend='reference'"):
            rope_roae(*inputs, backend="triton")


def test_empty_batch(kernel_device):
    inputs = make_inputs(batch=0, device=kernel_device)
    assert rope_roae(*inputs, backend="triton")[0].shape == (0, 4, 5, 16)


@pytest.mark.gpu
def test_no_recompilation_when_batch_or_sequence_changes():
    from rosa_kernels.rope_roae_triton import rope_roae_backward_kernel, rope_roae_forward_kernel

    def compiled():
        return [
            len(cache[0]) for kernel in (rope_roae_forward_kernel, rope_roae_backward_kernel)
            for cache in kernel.device_caches.values()
        ]  # fmt: skip

    def step(batch, seq):
        run(make_inputs(batch=batch, seq=seq, head_dim=80, low_pairs=10, dtype=torch.bfloat16, device="cuda"))

    step(2, 64)
    before = compiled()
    for batch, seq in ((1, 1), (1, 64), (3, 17), (16, 230), (1, 4097)):
        step(batch, seq)
    assert compiled() == before


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    inputs = make_inputs(dtype=torch.bfloat16, device="cuda")
    rope_roae(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rope_roae(*inputs)
    inputs[0].normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, rope_roae(*inputs), strict=True))


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    # 17,000 x 1 x 1,024 heads x 128 = 2.2e9 elements, 4.5 GB in bfloat16: the last tokens lie past 2^31 elements.
    seq, heads = 17_000, 1024
    q = torch.randn(1, seq, heads, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    cos, sin = torch.randn(2, 1, seq, 128, device="cuda")
    k, signal = q[:, :1], torch.randn(1, seq, heads * 2, dtype=torch.bfloat16, device="cuda")
    key_signal = signal[..., :2].contiguous()
    whole = rope_roae(q, k, cos, sin, signal, key_signal)[0][:, :, -5:]
    tail = (q[:, :, -5:], k[:, :, -5:], cos[:, -5:], sin[:, -5:], signal[:, -5:], key_signal[:, -5:])
    assert torch.equal(whole, rope_roae(*tail)[0])


def test_backend_is_chosen_by_argument_then_environment_then_device(monkeypatch, kernel_device):
    inputs = make_inputs(device="cpu")
    monkeypatch.setenv("ROSA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match=r"ROSA_BACKEND.*triton, reference.*'nonsense'"):
        rope_roae(*inputs)
    assert torch.equal(rope_roae(*inputs, backend="reference")[0], rope_roae_reference(*inputs)[0])
    monkeypatch.setenv("ROSA_BACKEND", "")
    assert torch.equal(rope_roae(*inputs)[0], rope_roae_reference(*inputs)[0])
    monkeypatch.delenv("ROSA_BACKEND")
    assert torch.equal(rope_roae(*inputs)[0], rope_roae_reference(*inputs)[0])
    assert rosa_kernels.available_backends() == ("triton", "reference")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if kernel_device == "cpu":
        assert rosa_kernels.available_backends() == ("reference",)
    with pytest.raises(RuntimeError, match=r"needs tensors on a GPU, got cpu.*TRITON_INTERPRET=1"):
        rope_roae(*inputs, backend="triton")


def zeros(*shape, **options):
    return torch.zeros(shape, **{"dtype": torch.float64, **options})


# What is changed in q [2, 4, 5, 16], k [2, 2, 5, 16], cos and sin [1, 5, 16], signal [2, 5, 16], key_signal [2, 5, 8].
BAD_INPUTS = {
    "q is a list": (dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
    "integer k": (dict(k=zeros(2, 2, 5, 16, dtype=torch.long)), TypeError, "k must be of a floating dtype"),
    "k of another dtype": (dict(k=zeros(2, 2, 5, 16, dtype=torch.half)), TypeError, "k must have q's dtype.*float16"),
    "another device": (dict(signal=zeros(2, 5, 16, device="meta")), ValueError, "signal is on meta, but q is on cpu"),
    "q of three dimensions": (dict(q=zeros(2, 5, 16)), ValueError, r"q must have the shape \[batch, heads"),
    "k of another length": (dict(k=zeros(2, 2, 6, 16)), ValueError, r"k must be \[2, key_heads, 5, 16\]"),
    "cos of another length": (dict(cos=zeros(1, 6, 16)), ValueError, r"cos must be \[1 or 2, 5, 16\]"),
    "cos of another batch": (dict(cos=zeros(3, 5, 16)), ValueError, r"cos must be \[1 or 2, 5, 16\]"),
    "sin unlike cos": (
        dict(sin=zeros(1, 5, 8)),
        ValueError,
        r"sin must have cos's shape \[1, 5, 16\], got \[1, 5, 8\]",
    ),
    "cos of every batch, sin of one": (dict(cos=zeros(2, 5, 16)), ValueError, r"sin must .* \[2, 5, 16\], got \[1, 5,"),
    "cos wider than the head": (dict(cos=zeros(1, 5, 18)), ValueError, "even and from 2 to head_dim=16, got 18"),
    "odd rotary size": (dict(rotary_dim=7), ValueError, r"rotary size must be even .* got 7"),
    "cos fits no rotary size": (dict(rotary_dim=12), ValueError, "cos must be 12 or 6 wide"),
    "cos with gradients": (dict(cos=zeros(1, 5, 16).requires_grad_()), ValueError, "cos and sin get no gradient"),
    "signal of no whole heads": (dict(signal=zeros(2, 5, 15)), ValueError, r"signal must be \[2, 5, 4 heads"),
    "signal wider than the rotary part": (dict(signal=zeros(2, 5, 72)), ValueError, "d_low even and from 2 to 16"),
    "no key signal": (dict(key_signal=None), ValueError, r"needed where key heads \(2\) differ from query heads \(4\)"),
    "key signal of another width": (dict(key_signal=zeros(2, 5, 4)), ValueError, r"key_signal must be \[2, 5, 8\]"),
    "no key signal of keys alone": (
        dict(q=zeros(2, 0, 5, 16), signal=zeros(2, 5, 0), key_signal=None),
        ValueError,
        r"key_signal is needed where key heads \(2\) differ from query heads \(0\)",
    ),
    "odd key signal of keys alone": (
        dict(q=zeros(2, 0, 5, 16), signal=zeros(2, 5, 0), key_signal=zeros(2, 5, 6)),
        ValueError,
        r"key_signal must be \[2, 5, 2 heads \* d_low\] with d_low even and from 2 to 16, got \[2, 5, 6\]",
    ),
    "a signal of no queries": (
        dict(q=zeros(2, 0, 5, 16)),
        ValueError,
        r"signal must be \[2, 5, 0\] as there are no query heads, got \[2, 5, 16\]",
    ),
    "half a cos of another length": (
        dict(cos=zeros(1, 6, 8), rotary_dim=16),
        ValueError,
        r"cos must be \[1 or 2, 5, 16\], or 8 wide with rotary_dim given, got \[1, 6, 8\]",
    ),
    "alpha not finite": (dict(alpha=float("nan")), ValueError, "alpha must be finite, got nan"),
    "unknown backend": (dict(backend="cuda"), ValueError, "must be one of triton, reference, got 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_named(change, error, message):
    arguments = dict(zip(("q", "k", "cos", "sin", "signal", "key_signal"), make_inputs(), strict=True)) | change
    with pytest.raises(error, match=message):
        rope_roae(**arguments)

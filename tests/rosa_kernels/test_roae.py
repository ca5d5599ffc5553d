"""roae: the Triton backend against the float64 reference, its gradients, its promises, its errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from rosa_kernels import roae, roae_triton


def make_inputs(
    *, batch=2, heads=4, key_heads=2, seq=5, head_dim=16, rotary_dim=None, low_pairs=2, rank=6, hidden_size=12,
    interleaved=False, batch_cos=False, shared=False, sequence_major=True, dtype=torch.float64, weight_dtype=None,
    device="cpu",
):  # fmt: skip
    """The tensors of `roae` by name; q and k laid out as Hugging Face's transposed projections, or not."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim

    def normal(*size, dtype=dtype):
        return torch.randn(size, dtype=torch.float64).to(device, dtype)

    def head_tensor(count):
        if sequence_major:
            return normal(batch, seq, count, head_dim).transpose(1, 2)
        return normal(batch, count, seq, head_dim)

    def rotary():
        values = normal(batch if batch_cos else 1, seq, rotary_dim // 2)
        return values.repeat_interleave(2, -1) if interleaved else torch.cat((values, values), -1)

    def weight(outputs, inputs):
        return normal(outputs, inputs, dtype=weight_dtype or dtype) / inputs**0.5

    tensors = dict(
        q=head_tensor(heads), k=head_tensor(key_heads), cos=rotary(), sin=rotary(),
        hidden_states=normal(batch, seq, hidden_size),
        down=weight(rank, hidden_size), up=weight(heads * 2 * low_pairs, rank),
    )  # fmt: skip
    if not shared:
        tensors |= dict(gqa_down=weight(rank, heads * 2 * low_pairs), gqa_up=weight(key_heads * 2 * low_pairs, rank))
    return tensors


@pytest.fixture(autouse=True)
def _one_launch_in_every_dtype(monkeypatch):
    """Elsewhere than in these tests a GPU runs the one launch in 16-bit dtypes alone."""
    monkeypatch.setattr(roae_triton, "ONE_LAUNCH_BYTES", 8)


LEAVES = ("q", "k", "hidden_states", "down", "up", "gqa_down", "gqa_up")


def run(inputs, function=roae, wanted=LEAVES, **options):
    """Outputs, and the gradients of a random projection of them, by name."""
    inputs = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    leaves = [name for name in LEAVES if name in inputs and name in wanted]
    outputs = function(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outputs]
    asked = [i for i, o in enumerate(outputs) if o.requires_grad]
    grads = torch.autograd.grad(
        [outputs[i] for i in asked], [inputs[name] for name in leaves], [directions[i] for i in asked]
    )
    return dict(zip(("q_out", "k_out", *leaves), (*outputs, *grads), strict=True))


def errors(values, exact):
    return {name: ((values[name].double() - e).norm() / e.norm()).item() for name, e in exact.items()}


# Key heads from as many as query heads (with a shared signal, or one of their own) to one; heads and ranks that are no
# powers of two; partial rotary; one pair, all pairs; one token, tokens just past a block; both memory layouts.
CASES = {
    "grouped": dict(),
    "multi-query": dict(heads=5, key_heads=1, seq=7),
    "32 query heads to one key head": dict(heads=32, key_heads=1, seq=3),
    "shared signal": dict(heads=3, key_heads=3, shared=True),
    "as many key heads, a signal of their own": dict(heads=2, key_heads=2),
    "more key heads than query heads": dict(heads=1, key_heads=3),
    "head of 80, rank 20": dict(head_dim=80, low_pairs=10, rank=20, seq=3),
    "head of 96, partial rotary": dict(head_dim=96, rotary_dim=24, low_pairs=3, seq=3),
    "head of 512": dict(head_dim=512, low_pairs=64, seq=2, heads=2, key_heads=1, rank=64),
    "one pair, rank 1": dict(head_dim=2, low_pairs=1, rank=1),
    "every pair": dict(low_pairs=8),
    "one token": dict(batch=1, seq=1),
    "tokens past a block": dict(batch=3, seq=43, heads=2, key_heads=1),
    "cos of every batch": dict(batch_cos=True, seq=6),
    "interleaved": dict(interleaved=True),
    "interleaved, partial, cos of every batch": dict(
        interleaved=True, head_dim=20, rotary_dim=12, batch_cos=True, low_pairs=1
    ),
    "head-major": dict(sequence_major=False, batch_cos=True),
    "the largest rank of one launch": dict(rank=256, seq=3, heads=2, key_heads=1),
    "a rank for separate products": dict(rank=257, seq=3, heads=2, key_heads=1),
    "tiles for separate products": dict(head_dim=256, low_pairs=128, rank=65, seq=2, heads=2, key_heads=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_triton_computes_what_the_reference_computes_in_float64(kernel_device, case):
    inputs = make_inputs(**case, device=kernel_device)
    options = dict(alpha=0.7, interleaved=case.get("interleaved", False))
    exact = run(inputs, backend="reference", **options)
    assert max(errors(run(inputs, backend="triton", **options), exact).values()) < 1e-14


@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(heads=3, key_heads=3, shared=True),
        dict(head_dim=80, low_pairs=10, rank=20, seq=3),
        dict(interleaved=True, head_dim=48, rotary_dim=40, low_pairs=3),
        dict(heads=1, key_heads=1, low_pairs=1, rank=1, hidden_size=1),
    ],
    ids=["grouped", "shared signal", "head of 80, rank 20", "interleaved, partial rotary", "one of each"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_signals_that_are_not_finite_spoil_what_they_do_in_the_reference(kernel_device, case, bad):
    options = dict(alpha=0.7, interleaved=case.get("interleaved", False))
    for place in ("hidden_states", "down", "up"):
        inputs = make_inputs(**case, device=kernel_device)
        if case.get("rank") == 1:  # where the signals of infinity are all infinity, and not NaN
            inputs |= {name: t.abs() for name, t in inputs.items()}
        inputs[place][..., -1, -1] = bad
        ours, exact = (run(inputs, backend=backend, **options) for backend in ("triton", "reference"))
        for name, value in exact.items():
            assert torch.equal(ours[name].isnan(), value.isnan()), (place, name)
        spoilt = ~exact["q_out"].isfinite()
        assert spoilt.any() and not spoilt.all(), place  # high-frequency pairs stay
        if place == "hidden_states":
            assert not spoilt[:, :, :-1].any() or inputs["q"].shape[2] == 1


# Heads as large as models have them, so that a part of each only rotates.
CASES_OF_16_BITS = {
    "grouped": dict(),
    "shared signal": dict(heads=2, shared=True),
    "interleaved": dict(interleaved=True, batch_cos=True),
    "interleaved heads of 256": dict(head_dim=256, low_pairs=32, interleaved=True),
    "heads of 80": dict(head_dim=80, low_pairs=10, rank=20),
    "partial rotary": dict(head_dim=128, rotary_dim=96, low_pairs=12),
    "half of the pairs, head-major": dict(head_dim=128, low_pairs=32, sequence_major=False),
}


@pytest.mark.parametrize("case", CASES_OF_16_BITS.values(), ids=CASES_OF_16_BITS.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_kernels_are_near_float64(kernel_device, case, dtype):
    shape = dict(heads=3, key_heads=2, seq=21, head_dim=128, low_pairs=16, rank=32, hidden_size=64) | case
    shape["key_heads"] = shape["heads"] if case.get("shared") else 2
    inputs = make_inputs(**shape, dtype=dtype, weight_dtype=torch.float32, device=kernel_device)
    options = dict(alpha=0.7, interleaved=case.get("interleaved", False))
    rounded = {name: t.to(dtype).double() for name, t in inputs.items()}
    exact = run(rounded, backend="reference", **options)
    ours = errors(run(inputs, backend="triton", **options), exact)
    assert max(ours.values()) < (2e-3 if dtype == torch.float16 else 2e-2), ours


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2), heads=st.integers(1, 4), key_heads=st.integers(1, 4), seq=st.integers(1, 40),
    pairs=st.integers(1, 40), rest=st.integers(0, 9), low=st.floats(0, 1), rank=st.integers(1, 40),
    interleaved=st.booleans(), batch_cos=st.booleans(), sequence_major=st.booleans(), shared=st.booleans(),
)  # fmt: skip
def test_triton_equals_reference_at_any_shape(
    kernel_device, batch, heads, key_heads, seq, pairs, rest, low, rank, interleaved, batch_cos, sequence_major, shared
):
    inputs = make_inputs(
        batch=batch, heads=heads, key_heads=heads if shared else key_heads, seq=seq, head_dim=2 * pairs + rest,
        rotary_dim=2 * pairs, low_pairs=max(1, int(low * pairs)), rank=rank, interleaved=interleaved,
        batch_cos=batch_cos, sequence_major=sequence_major, shared=shared, device=kernel_device,
    )  # fmt: skip
    exact = run(inputs, interleaved=interleaved, backend="reference")
    assert max(errors(run(inputs, interleaved=interleaved, backend="triton"), exact).values()) < 1e-13


@pytest.mark.parametrize(
    "case",
    [
        dict(batch=1, heads=2, key_heads=1, seq=2, head_dim=4, low_pairs=1, rank=2, hidden_size=3),
        dict(batch=1, heads=2, key_heads=2, seq=2, head_dim=4, low_pairs=1, rank=2, hidden_size=3, shared=True),
        dict(batch=1, heads=2, key_heads=1, seq=2, head_dim=6, rotary_dim=4, low_pairs=1, rank=2, interleaved=True),
    ],
    ids=["grouped", "shared signal", "interleaved, partial rotary"],
)
def test_gradcheck(kernel_device, case):
    inputs = make_inputs(**case, device=kernel_device)
    leaves = {name: inputs[name].requires_grad_() for name in LEAVES if name in inputs}

    def op(*values):
        changed = dict(zip(leaves, values, strict=True))
        return roae(**inputs | changed, alpha=0.7, interleaved=case.get("interleaved", False), backend="triton")

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


def eager(q, k, cos, sin, hidden_states, down, up, gqa_down, gqa_up):
    """Eq. 2 to 4 the way a model is written: operation by operation, each rounding to the tensors' dtype."""
    S = F.silu(F.linear(F.linear(hidden_states, down), up))
    S_K = F.linear(F.linear(S, gqa_down), gqa_up)

    def enhance(x, s):
        a, b = x.chunk(2, dim=-1)
        x = x * cos.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(1)
        half, n = x.shape[-1] // 2, s.shape[-1] // x.shape[1] // 2
        low = torch.cat((torch.arange(half - n, half), torch.arange(2 * half - n, 2 * half))).to(x.device)
        z = x[..., low]
        return x.index_copy(-1, low, z + z * (0.1 * s.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)))

    return enhance(q, S), enhance(k, S_K)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)  # Triton's interpreter truncates to bfloat16, where a GPU rounds to nearest
def test_16_bit_error_is_no_larger_than_that_of_the_same_mathematics_in_eager(kernel_device, dtype):
    shape = dict(seq=33, heads=4, key_heads=2, head_dim=32, low_pairs=4, rank=32, hidden_size=64)
    inputs = make_inputs(**shape, dtype=dtype, device=kernel_device)
    exact = run({name: t.double() for name, t in inputs.items()}, backend="reference")
    ours, theirs = errors(run(inputs, backend="triton"), exact), errors(run(inputs, eager), exact)
    assert max(ours.values()) < {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype], ours
    if dtype != torch.float32:  # in float32 both round as they compute, and neither is nearer
        assert all(ours[name] <= 1.1 * theirs[name] for name in exact), (ours, theirs)
        assert ours["q_out"] < 0.95 * theirs["q_out"] and ours["k_out"] < 0.95 * theirs["k_out"], (ours, theirs)


def test_float32_weights_of_16_bit_activations_get_unrounded_gradients(kernel_device):
    shape = dict(seq=33, low_pairs=4, rank=16, hidden_size=32, dtype=torch.float16, device=kernel_device)
    inputs = make_inputs(**shape, weight_dtype=torch.float32)
    grads = run(inputs, backend="triton")
    exact = run({name: t.half().double() for name, t in inputs.items()}, backend="reference")
    for name in ("down", "up", "gqa_down", "gqa_up"):
        assert grads[name].dtype == torch.float32
        assert not torch.equal(grads[name], grads[name].half().float())
    assert max(errors(grads, exact).values()) < 2e-3


@pytest.mark.parametrize("wanted", [*LEAVES, "q hidden_states", "k up", "hidden_states gqa_up"])
@pytest.mark.parametrize("shared", [False, True], ids=["grouped", "shared signal"])
def test_only_the_gradients_asked_for(kernel_device, wanted, shared):
    inputs = make_inputs(shared=shared, heads=4, key_heads=4 if shared else 2, device=kernel_device)
    wanted = set(wanted.split())
    if not wanted <= inputs.keys():
        pytest.skip("keys that share the queries' signal have no W_GQA")
    exact = run(inputs, wanted=wanted, backend="reference")
    ours = run(inputs, wanted=wanted, backend="triton")
    assert ours.keys() == exact.keys() == {"q_out", "k_out", *wanted}
    assert max(errors(ours, exact).values()) < 1e-14


class Operators(TorchDispatchMode):
    """The operators that launch something, by name."""

    ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    VIEW = ("detach", "alias", "view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "slice", "select")
    FREE = frozenset(f"aten::{name}" for name in (*ALLOCATE, *VIEW, "unsqueeze"))

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def launches(inputs, wanted):
    inputs = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    with Operators() as forward:
        outputs = roae(**inputs, backend="triton")
    directions = [torch.ones_like(o) for o in outputs]
    with Operators() as backward:
        torch.autograd.backward(outputs, directions)
    return forward.names, backward.names


def test_launches(kernel_device):
    half = dict(dtype=torch.float16, batch_cos=True, device=kernel_device)
    forward, backward = launches(make_inputs(**half, weight_dtype=torch.float32), LEAVES)
    assert forward == ["aten::_foreach_copy_", "aten::mm", "rosa::roae_forward"]  # all weights rounded by one launch
    kernels = ["rosa::roae_backward_keys", "rosa::roae_backward"]
    products = ["aten::mm"] * 2 + ["rosa::weight_gradient"] * 4  # of the latent, H and the four weights
    assert backward == ["aten::_foreach_copy_", *kernels, *products]
    # A layer frozen by layer selection: gradients pass through it, and no weight's is computed.
    forward, backward = launches(make_inputs(**half), {"q", "k", "hidden_states"})
    assert forward == ["aten::mm", "rosa::roae_forward"]
    assert backward == [*kernels, "aten::mm", "aten::mm"]
    forward, backward = launches(make_inputs(**half, shared=True, key_heads=4), {"q", "k"})
    assert forward == ["aten::mm", "rosa::roae_forward"] and backward == ["rosa::roae_backward"]


def test_no_copies_inside_the_launches(kernel_device):
    for interleaved in (False, True):
        inputs = make_inputs(dtype=torch.float16, interleaved=interleaved, batch_cos=True, device=kernel_device)
        columns = slice(None, None, 2) if interleaved else slice(8)
        q, k, cos, sin = inputs["q"], inputs["k"], inputs["cos"][..., columns], inputs["sin"][..., columns]
        latent = inputs["hidden_states"].flatten(0, 1) @ inputs["down"].T
        up, gqa_down, gqa_up = inputs["up"], inputs["gqa_down"], inputs["gqa_up"]
        with Operators() as inside:
            forward = roae_triton.forward_launch(q, k, cos, sin, latent, up, gqa_down, gqa_up, 0.1, interleaved, True)
            low, key_latent = forward.outputs[2:]
            options = (0.1, interleaved, True, True, True, True)
            keys = roae_triton.backward_keys_launch(k, cos, sin, gqa_up, low, key_latent, 4, *options)
            roae_triton.backward_launch(q, k, cos, sin, latent, up, gqa_down, low, keys.outputs[1], *options)
        assert inside.names == []


def test_cos_that_cannot_be_read_wide_is_copied(kernel_device):
    inputs = make_inputs(device=kernel_device)
    for name in ("cos", "sin"):  # every other column, but of rows of 15 and then from the second column on
        odd = torch.randn(1, 5, 15, dtype=torch.float64, device=kernel_device)
        from_the_second = torch.randn(1, 5, 16, dtype=torch.float64, device=kernel_device)
        inputs[name] = odd[..., ::2] if name == "cos" else from_the_second[..., 1::2]
    exact = run(inputs, rotary_dim=16, backend="reference")
    assert max(errors(run(inputs, rotary_dim=16, backend="triton"), exact).values()) < 1e-14


def saved(inputs, wanted):
    """Bytes saved for backward, less those of the inputs other than H."""
    inputs = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        roae(**inputs, backend="triton")
    given = {t.untyped_storage().data_ptr() for name, t in inputs.items() if name != "hidden_states"}
    return sum(size for pointer, size in storages.items() if pointer not in given)


def test_saves_two_latents_and_the_low_pairs_and_the_input_for_w_down_alone(kernel_device):
    inputs = make_inputs(dtype=torch.float16, device=kernel_device)
    tokens, rank, low_pairs_of_all_heads = 2 * 5, 6, (4 + 2) * 4
    without_input = 2 * tokens * (2 * rank + low_pairs_of_all_heads)
    assert saved(inputs, {"q", "k", "hidden_states"}) == without_input
    assert saved(inputs, {"up", "gqa_up"}) == without_input
    assert saved(inputs, {"down"}) == without_input + inputs["hidden_states"].nbytes
    with torch.no_grad():
        assert saved(inputs, LEAVES) == 0


def test_few_and_many_heads_a_program_give_the_same(kernel_device, monkeypatch):
    inputs = make_inputs(heads=5, key_heads=1, seq=40, device=kernel_device)
    results, counts = [], []
    for aim in (1, 5, 10**6):
        monkeypatch.setattr(roae_triton, "PROGRAMS", aim)
        half_width = (inputs["cos"][..., :8], inputs["sin"][..., :8])
        latent = inputs["hidden_states"].flatten(0, 1) @ inputs["down"].T
        weights = (inputs["up"], inputs["gqa_down"], inputs["gqa_up"])
        launch = roae_triton.forward_launch(inputs["q"], inputs["k"], *half_width, latent, *weights, 0.1, False, True)
        counts.append(launch.arguments["heads_per_program"])
        results.append(run(inputs, backend="triton"))
    assert counts == [5, 3, 1]
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@pytest.mark.parametrize("keys_ahead_below", [0, 10**6], ids=["keys among the queries", "keys ahead"])
def test_keys_are_the_same_however_many_programs_share_eq_3(kernel_device, monkeypatch, keys_ahead_below):
    inputs = make_inputs(heads=6, key_heads=2, batch=1, seq=40, device=kernel_device)
    monkeypatch.setattr(roae_triton, "BLOCK_S", 16)
    monkeypatch.setattr(roae_triton, "KEYS_AHEAD_BELOW", keys_ahead_below)
    exact, results, parts = run(inputs, backend="reference"), [], []
    for aim, steps in ((1, 1), (8, 1), (64, 1), (64, 2)):  # of two blocks, and of two steps each
        monkeypatch.setattr(roae_triton, "KEY_PROGRAMS", aim)
        monkeypatch.setattr(roae_triton, "KEY_STEPS", steps)
        half_width = (inputs["cos"][..., :8], inputs["sin"][..., :8])
        latent = inputs["hidden_states"].flatten(0, 1) @ inputs["down"].T
        weights = (inputs["up"], inputs["gqa_down"], inputs["gqa_up"])
        launch = roae_triton.forward_launch(inputs["q"], inputs["k"], *half_width, latent, *weights, 0.1, False, True)
        parts.append(launch.arguments["key_parts"])
        results.append(run(inputs, backend="triton"))
        assert all(torch.equal(value, results[-1][name]) for name, value in run(inputs, backend="triton").items())
        assert max(errors(results[-1], exact).values()) < 1e-14
    assert parts == [1, 2, 2, 1]


@pytest.mark.parametrize("sequence_major", [True, False])
def test_outputs_and_gradients_keep_dtype_and_layout_and_inputs_are_untouched(kernel_device, sequence_major):
    inputs = make_inputs(sequence_major=sequence_major, dtype=torch.float16, device=kernel_device)
    before = {name: t.clone() for name, t in inputs.items()}
    results = run(inputs, backend="triton")
    for ours, theirs in (("q_out", "q"), ("k_out", "k"), *((name, name) for name in LEAVES)):
        assert (results[ours].dtype, results[ours].shape) == (inputs[theirs].dtype, inputs[theirs].shape)
        assert results[ours].stride() == inputs[theirs].stride()
    assert all(torch.equal(t, before[name]) for name, t in inputs.items())


def test_any_strides(kernel_device):
    inputs = make_inputs(heads=4, key_heads=2, device=kernel_device)
    inputs["q"] = torch.randn(2, 16, 5, 8, dtype=torch.float64, device=kernel_device).permute(0, 3, 2, 1)[:, ::2]
    inputs["k"] = inputs["k"][:, :1].expand(-1, 2, -1, -1)
    inputs["cos"] = inputs["cos"].expand(2, -1, -1)
    inputs["sin"] = inputs["sin"].expand(2, -1, -1).flip(-1)
    for name in ("hidden_states", "down", "up", "gqa_down", "gqa_up"):
        t = inputs[name]
        inputs[name] = torch.stack((t, t), dim=-1).transpose(-2, -3)[..., 0].transpose(-1, -2)
    exact = run(inputs, backend="reference")
    assert max(errors(run(inputs, backend="triton"), exact).values()) < 1e-14


def test_cos_of_half_the_width(kernel_device):
    inputs = make_inputs(device=kernel_device)
    half = inputs | dict(cos=inputs["cos"][..., :8], sin=inputs["sin"][..., :8])
    for backend in ("triton", "reference"):
        full = run(inputs, backend=backend)
        halved = run(half, rotary_dim=16, backend=backend)
        assert all(torch.equal(value, halved[name]) for name, value in full.items())


def test_a_wider_input_is_rounded_to_the_queries_dtype_in_and_out_of_autocast(kernel_device):
    inputs = make_inputs(dtype=torch.float16, weight_dtype=torch.float32, device=kernel_device)
    wide = inputs | dict(hidden_states=inputs["hidden_states"].float())
    plain = run(inputs, backend="triton")
    for enabled in (False, True):
        with torch.autocast(kernel_device, torch.bfloat16, enabled=enabled):
            ours = run(wide, backend="triton")
        assert all(torch.equal(value.float(), ours[name].float()) for name, value in plain.items())


def test_double_backward_is_refused_by_name(kernel_device):
    inputs = make_inputs(device=kernel_device)
    out = roae(**inputs | dict(q=inputs["q"].requires_grad_()), backend="triton")[0]
    with pytest.raises(RuntimeError, match=r"^roae's.* no double backward.*backend='reference'"):
        torch.autograd.grad(out.sum(), inputs["q"], create_graph=True)


def test_empty_batch(kernel_device):
    results = run(make_inputs(batch=0, dtype=torch.float16, device=kernel_device), backend="triton")
    assert results["q_out"].shape == (0, 4, 5, 16) and not results["down"].any()


@pytest.mark.parametrize("leaf", ["q", "hidden_states", "gqa_up"])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused_not_dropped(kernel_device, leaf, grad):
    inputs = make_inputs(device=kernel_device)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        inputs[leaf] = forward_ad.make_dual(inputs[leaf], torch.ones_like(inputs[leaf]))
        with pytest.raises(RuntimeError, match=r"roae's Triton.*no forward mode.*backend='reference'"):
            roae(**inputs, backend="triton")


@pytest.mark.gpu
def test_no_recompilation_when_batch_or_sequence_changes():
    kernels = (roae_triton.roae_forward_kernel, roae_triton.roae_backward_keys_kernel, roae_triton.roae_backward_kernel)

    def compiled():
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    def step(batch, seq):
        run(make_inputs(batch=batch, seq=seq, head_dim=80, low_pairs=10, dtype=torch.bfloat16, device="cuda"))

    step(2, 64)
    before = compiled()
    for batch, seq in ((1, 1), (1, 64), (3, 17), (16, 230), (1, 4097)):
        step(batch, seq)
    assert compiled() == before


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    # 17,000 x 1,024 heads x 128 = 2.2e9 elements, 4.5 GB in bfloat16: the last tokens lie past 2^31 elements.
    seq, heads = 17_000, 1024
    q = torch.randn(1, seq, heads, 128, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    cos, sin = torch.randn(2, 1, seq, 128, device="cuda")
    H = torch.randn(1, seq, 16, dtype=torch.bfloat16, device="cuda")
    down, up, gqa_down, gqa_up = (
        torch.randn(size, device="cuda") for size in ((16, 16), (2 * heads, 16), (16, 2 * heads), (2, 16))
    )
    whole = roae(q, q[:, :1], cos, sin, H, down, up, gqa_down, gqa_up)[0][:, :, -5:]
    tail = (q[:, :, -5:], q[:, :1, -5:], cos[:, -5:], sin[:, -5:], H[:, -5:])
    assert torch.equal(whole, roae(*tail, down, up, gqa_down, gqa_up)[0])


def zeros(*shape, **options):
    return torch.zeros(shape, **{"dtype": torch.float64, **options})


# What is changed in the inputs of make_inputs: hidden_states [2, 5, 12], down [6, 12], up [16, 6], gqa_down [6, 16],
# gqa_up [8, 6]. q, k, cos and sin are checked as rope_roae's are.
BAD_INPUTS = {
    "q is a list": (dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
    "integer weights": (dict(up=zeros(16, 6, dtype=torch.long)), TypeError, "up must be of a floating dtype"),
    "another device": (dict(down=zeros(6, 12, device="meta")), ValueError, "down is on meta, but q is on cpu"),
    "H of another length": (dict(hidden_states=zeros(2, 6, 12)), ValueError, r"hidden_states must be \[2, 5, hidden"),
    "H of another size": (dict(hidden_states=zeros(2, 5, 13)), ValueError, r"got \[2, 5, 13\] and \[6, 12\]"),
    "a vector for a weight": (dict(down=zeros(12)), ValueError, r"down must be a matrix.* got \[12\]"),
    "up of no whole heads": (dict(up=zeros(15, 6)), ValueError, r"up must be \[4 heads \* d_low, rank 6\]"),
    "up wider than the rotary part": (dict(up=zeros(72, 6)), ValueError, "d_low even and from 2 to 16"),
    "up of another rank": (dict(up=zeros(16, 5)), ValueError, r"rank 6\].* got \[16, 5\]"),
    "half of W_GQA": (dict(gqa_up=None), ValueError, "two factors of W_GQA: pass both or neither"),
    "no W_GQA": (dict(gqa_down=None, gqa_up=None), ValueError, r"needed where key heads \(2\) differ .* \(4\)"),
    "gqa_down transposed": (dict(gqa_down=zeros(16, 6)), ValueError, r"gqa_down must be \[6, 16\].* got \[16, 6\]"),
    "gqa_up of another width": (dict(gqa_up=zeros(4, 6)), ValueError, r"gqa_up must be \[8, 6\]"),
    "cos with gradients": (dict(cos=zeros(1, 5, 16).requires_grad_()), ValueError, "cos and sin get no gradient"),
    "alpha not finite": (dict(alpha=float("inf")), ValueError, "alpha must be finite, got inf"),
    "unknown backend": (dict(backend="cuda"), ValueError, "must be one of triton, reference, got 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        roae(**make_inputs() | change)

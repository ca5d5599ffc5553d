"""Every rotary layout that transformers' families use, against the family's own rotary function and Eq. 4 by hand."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import rosa
from rosa.models.rotary import RotaryLayout

HALF = "elements i and i + R / 2"
INTERLEAVED = "elements 2i and 2i + 1"
# Heads of 16, of which StableLM hands its rotary function the first 8. What the probe must find, which elements make a
# pair, and changes to the configuration.
FAMILIES = {
    "ernie4_5": (RotaryLayout(16, True, "first half"), INTERLEAVED, {}),
    "glm": (RotaryLayout(8, True, "first half"), INTERLEAVED, {}),
    "glm4": (RotaryLayout(8, True, "first half"), INTERLEAVED, {}),
    "helium": (RotaryLayout(16, True, "first half"), INTERLEAVED, {}),
    "stablelm": (RotaryLayout(8, False, "first half"), HALF, {"partial_rotary_factor": 0.5}),
    "gpt_oss": (RotaryLayout(16, False, "all"), HALF, {"num_local_experts": 2, "num_experts_per_tok": 1}),
    "nanochat": (RotaryLayout(16, False, "first half", -1), HALF, {}),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    sizes = dict(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **FAMILIES[family][2],
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()


CONFIG = rosa.RosaConfig(rank=4, r_low=0.5, alpha=0.3, train_norms=False, adapter_dtype="float64")


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_adapter_is_the_familys_own_rotation_and_eq_4(model, family, backend, monkeypatch, kernel_device):
    monkeypatch.setenv("ROSA_BACKEND", backend)
    layout, pairing, _ = FAMILIES[family]
    attention = model.to(kernel_device, torch.float64).model.layers[0].self_attn
    rope = type(attention).forward.__globals__["apply_rotary_pos_emb"]
    rope = getattr(rope, "__wrapped__", rope)
    roae = rosa.patch(model, CONFIG).model.layers[0].self_attn.roae
    assert roae.layout == layout
    torch.nn.init.normal_(roae.up)

    def normal(*size):
        return torch.randn(size, dtype=torch.float64, device=kernel_device)

    width = 8 if family == "stablelm" else 16
    H, q, k = normal(2, 5, 64), normal(2, 4, 5, width), normal(2, 2, 5, width)
    positions = torch.tensor([[0, 1, 2, 3, 4], [3, 0, 1, 0, 1]], device=kernel_device)  # packed, another for each row
    cos, sin = model.model.rotary_emb(H, positions)
    S = F.silu(H @ roae.down.T @ roae.up.T)
    S_K = S @ roae.gqa_down.T @ roae.gqa_up.T
    outputs = roae(q, k, cos, sin, H)
    for ours, rotated, s in zip(outputs, rope(q, k, cos, sin), (S, S_K), strict=True):
        R, n = layout.rotary_dim, layout.rotary_dim // 4
        s = s.unflatten(-1, (rotated.shape[1], -1)).transpose(1, 2)
        pairs = torch.arange(R // 2 - n, R // 2, device=kernel_device)
        real, imaginary = (pairs, pairs + R // 2) if pairing == HALF else (2 * pairs, 2 * pairs + 1)
        gain = torch.ones_like(rotated)
        gain[..., real] += 0.3 * s[..., :n]
        gain[..., imaginary] += 0.3 * s[..., n:]
        torch.testing.assert_close(ours, rotated * gain)


def test_a_patched_model_computes_what_it_did_and_trains(model, monkeypatch):
    monkeypatch.setenv("ROSA_BACKEND", "reference")
    ids = torch.randint(3, 96, (2, 9))
    before = model(ids).logits
    rosa.patch(model, rosa.RosaConfig(rank=4, train_norms=False))
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6)
    model(ids).logits.square().sum().backward()
    for layer in model.model.layers:
        assert layer.self_attn.roae.up.grad.any()
    rosa.unpatch(model)
    assert torch.equal(model(ids).logits, before)

"""The reference: bitwise the RoPE of Hugging Face's models where the signal is silent, and Eq. 4 where it is not."""

import pytest
import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rope
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

from rosa_kernels import roae, rope_roae_reference


def heads(dtype=torch.float32):
    q = torch.randn(2, 7, 4, 16, dtype=dtype).transpose(1, 2)
    k = torch.randn(2, 7, 2, 16, dtype=dtype).transpose(1, 2)
    half = torch.randn(2, 1, 7, 8, dtype=dtype)
    return q, k, *half


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_silent_signal_is_bitwise_hugging_faces_rope(dtype):
    q, k, cos, sin = heads(dtype)
    silent = torch.zeros(2, 7, 4 * 4, dtype=dtype), torch.zeros(2, 7, 2 * 4, dtype=dtype)
    doubled = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    repeated = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    pairs = [
        (llama_rope(q, k, *doubled), rope_roae_reference(q, k, *doubled, *silent)),
        (glm_rope(q, k, *doubled), rope_roae_reference(q, k, cos, sin, *silent, interleaved=True, rotary_dim=16)),
    ]
    if dtype == torch.float32:  # Cohere's computes in float32 whatever it is given
        ours = rope_roae_reference(q, k, *repeated, *silent, interleaved=True)
        pairs.append((cohere_rope(q, k, *repeated), ours))
    for theirs, ours in pairs:
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_the_low_pairs_are_the_last_of_each_half_and_nothing_else_moves():
    q, k, cos, sin = heads()
    signal, key_signal = torch.randn(2, 7, 4 * 4), torch.randn(2, 7, 2 * 4)
    plain = llama_rope(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    ours = rope_roae_reference(q, k, cos, sin, signal, key_signal, alpha=0.5, rotary_dim=16)
    gain = {0: torch.nn.functional.silu(signal), 1: key_signal}
    for i, (before, after) in enumerate(zip(plain, ours, strict=True)):
        # d_low = 4, n = 2: real parts in columns 6 and 7, imaginary parts in 14 and 15 of a head of 16.
        s = gain[i].view(2, 7, -1, 4).transpose(1, 2)
        expected = before.clone()
        for column, j in ((6, 0), (7, 1), (14, 2), (15, 3)):
            expected[..., column] += before[..., column] * 0.5 * s[..., j]
        torch.testing.assert_close(after, expected)
        assert torch.equal(after[..., :6], before[..., :6]) and torch.equal(after[..., 8:14], before[..., 8:14])


def test_elements_beyond_the_rotary_part_pass_through():
    q, k, cos, sin = heads()
    signal = torch.randn(2, 7, 4 * 2), torch.randn(2, 7, 2 * 2)
    q_out, k_out = rope_roae_reference(q, k, cos[..., :3], sin[..., :3], *signal, rotary_dim=6)
    assert torch.equal(q_out[..., 6:], q[..., 6:]) and torch.equal(k_out[..., 6:], k[..., 6:])


def test_has_a_double_backward():
    q, k, cos, sin = (t.double()[:1, :, :2, :4] if t.dim() == 4 else t.double()[:1, :2, :2] for t in heads())
    signal = torch.randn(1, 2, 4 * 2, dtype=torch.float64, requires_grad=True)
    key_signal = torch.randn(1, 2, 2 * 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda s, ks: rope_roae_reference(q, k, cos, sin, s, ks, rotary_dim=4), (signal, key_signal)
    )


def test_roae_tells_its_shapes_on_the_meta_device():
    sizes = dict(q=(2, 4, 5, 16), k=(2, 2, 5, 16), cos=(1, 5, 16), sin=(1, 5, 16), hidden_states=(2, 5, 12))
    weights = dict(down=(6, 12), up=(16, 6), gqa_down=(6, 16), gqa_up=(8, 6))
    outputs = roae(**{name: torch.empty(size, device="meta") for name, size in (sizes | weights).items()})
    assert [(x.shape, x.device.type) for x in outputs] == [((2, 4, 5, 16), "meta"), ((2, 2, 5, 16), "meta")]

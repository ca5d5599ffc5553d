"""Every causal-LM family of transformers: a tiny model of each supported one, patched, trained on and unpatched."""

import contextlib

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import rosa
from rosa.adapters.plan import describe_base
from rosa.models.decoder import rotary_functions
from rosa.models.probe import rotary_sites
from rosa.models.rotary import family_function
from tests.rosa.families import FAMILIES, PAGE, blank_model, find, make_model, page

ALPHA = 0.3
CONFIG = rosa.RosaConfig(rank=4, r_low=0.5, alpha=ALPHA)


@pytest.fixture
def ids():
    return torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def stir(model):
    """Gives every W_up values, as training would."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("roae.up"):
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)


def logits(model, ids):
    return model(ids, use_cache=False).logits


def gradients(model, ids):
    model.zero_grad()
    (logits(model, ids) * torch.linspace(-1, 1, 9, device=ids.device)[None, :, None]).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def equations_by_hand(model):
    """Eq. 2 to 4 after the family's own rotation, in place of everything of RoSA that runs in a forward pass: its
    adapters are silenced, and each rotary function is the family's own with the equations behind it."""
    running = []  # the adapted attention module that is at work, and its input
    handles, replaced = [], []
    for site in rotary_sites(model):
        attention = site.attention
        hooks = attention._forward_pre_hooks
        kept = dict(hooks)
        hooks.clear()

        def enter(module, args, kwargs):
            running.append((module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]))

        def leave(*_):
            running.pop()

        handles += [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.register_forward_hook(leave),
        ]
        for inner in attention.modules():  # what rotates of its own within attention is not adapted
            if inner is not attention and rotary_functions(type(inner)) is not None:
                handles += [
                    inner.register_forward_pre_hook(lambda *_: running.append(None)),
                    inner.register_forward_hook(leave),
                ]
        replaced.append((attention, kept))
        namespace, names = rotary_functions(type(attention))
        for name in names:
            if not hasattr(namespace[name], "by_hand"):
                handles.append(_Replacement(namespace, name, running))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attention, kept in replaced:
            attention._forward_pre_hooks.update(kept)


class _Replacement:
    def __init__(self, namespace, name, running):
        self.namespace, self.name, self.served = namespace, name, namespace[name]
        original = family_function(self.served)

        def rotate(*args, **kwargs):
            rotated = original(*args, **kwargs)
            if not running or running[-1] is None:
                return rotated
            attention, H = running[-1]
            heads_at = 2 if attention.roae.layout.sequence_first else 1
            if isinstance(rotated, tuple):
                return tuple(eq_4(attention.roae, x, H, heads_at, i == 0) for i, x in enumerate(rotated))
            return eq_4(attention.roae, rotated, H, heads_at, rotated.shape[heads_at] == attention.roae.heads)

        rotate.by_hand = True
        namespace[name] = rotate

    def remove(self):
        self.namespace[self.name] = self.served


def eq_4(roae, x, H, heads_at, queries):
    S = F.silu(H @ roae.down.T @ roae.up.T)  # Eq. 2
    if not queries and roae.gqa_down is not None:
        S = S @ roae.gqa_down.T @ roae.gqa_up.T  # Eq. 3
    S = S.unflatten(-1, (x.shape[heads_at], -1))
    S = S.transpose(1, 2) if heads_at == 1 else S
    R, n = roae.layout.rotary_dim, S.shape[-1] // 2
    pairs = torch.arange(R // 2 - n, R // 2)
    real, imaginary = (2 * pairs, 2 * pairs + 1) if roae.layout.interleaved else (pairs, pairs + R // 2)
    gain = torch.ones_like(x)
    gain[..., real] += ALPHA * S[..., :n]
    gain[..., imaginary] += ALPHA * S[..., n:]
    return x * gain


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_supported_or_refused_before_anything_changed(family, ids):
    finding = find(family)
    if finding.status == "supported":
        a_patched_model_is_the_model_and_eq_2_to_4(make_model(family), ids, score=finding.words[-1])
    elif finding.status == "refused":
        patch_changes_nothing(blank_model(family)[0])


def patch_changes_nothing(model):
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(rosa.UnsupportedModelError):
        rosa.patch(model, CONFIG)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert not rosa.is_patched(model) and not any(m._forward_pre_hooks for m in model.modules())


def a_patched_model_is_the_model_and_eq_2_to_4(model, ids, score):
    before, keys = logits(model, ids), list(model.state_dict())

    rosa.patch(model, CONFIG)
    torch.testing.assert_close(logits(model, ids), before, atol=2e-6, rtol=2e-6)

    stir(model)
    ours = gradients(model, ids)
    out = logits(model, ids)
    assert not torch.allclose(out, before, atol=1e-3), "the adapter has no effect"
    with equations_by_hand(model):
        assert torch.allclose(out, logits(model, ids), atol=1e-4, rtol=1e-4)
        theirs = gradients(model, ids)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = theirs[name].abs().max() + 1e-6
        torch.testing.assert_close(
            gradient / scale, theirs[name] / scale, atol=1e-3, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() <= trained and any(name.endswith("roae.gqa_up") or name.endswith("roae.up") for name in ours)

    select_layers(model, ids, score)
    assert describe_base(model, rosa.RosaConfig())["layers"] > 0  # what a saved adapter must fit

    rosa.unpatch(model)
    assert torch.equal(logits(model, ids), before) and list(model.state_dict()) == keys


KINDS_OF_ROTATION = ["deepseek_v2", "deepseek_v3", "gemma3n_text", "gemma4_text", "llama4_text", "phi", "seed_oss"]


@pytest.mark.parametrize("family", KINDS_OF_ROTATION)
def test_the_kernels_do_every_kind_of_rotation(family, ids, monkeypatch, kernel_device):
    model, ids = make_model(family).to(kernel_device), ids.to(kernel_device)
    stir(rosa.patch(model, CONFIG))
    monkeypatch.setenv("ROSA_BACKEND", "reference")
    expected, gradients_expected = logits(model, ids), gradients(model, ids)
    monkeypatch.setenv("ROSA_BACKEND", "triton")
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-4, rtol=1e-4)
    for name, gradient in gradients(model, ids).items():
        scale = gradients_expected[name].abs().max() + 1e-6
        torch.testing.assert_close(gradient / scale, gradients_expected[name] / scale, atol=1e-3, rtol=0)


def select_layers(model, ids, score):
    """Layer selection ranks the adapted layers by `score`."""
    optimizer = torch.optim.SGD(rosa.trainable_parameters(model), lr=0.0)
    if score == "adapter":
        with pytest.raises(rosa.UnsupportedModelError, match="score='adapter' ranks them by the gradients of their"):
            rosa.DynamicLayerSelection(optimizer, model, interval=1, p_exploit=1.0)
    selection = rosa.DynamicLayerSelection(optimizer, model, interval=1, p_exploit=1.0, score=score)
    gradients(model, ids)
    selection.step()
    assert len(selection.selected_layers) == max(1, selection.num_layers // 2)
    assert sum(s > 0 for s in selection.scores) >= len(selection.selected_layers)
    selection.unfreeze()


def test_the_page_of_models_is_what_was_found():
    if f"transformers {transformers.__version__} maps" not in PAGE.read_text(encoding="utf-8"):
        pytest.skip("the page is of another version of transformers")
    findings = [find(family) for family in FAMILIES]
    assert PAGE.read_text(encoding="utf-8") == page(findings), "run python -m tests.rosa.families"
    supported = sum(finding.status == "supported" for finding in findings)
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert supported >= 80 and f"{supported} of the {len(findings)} families" in readme


SCALINGS = {
    "linear": dict(factor=4.0),
    "dynamic": dict(factor=4.0),  # another base once the text is longer than 6 tokens
    "yarn": dict(factor=4.0, original_max_position_embeddings=6),  # scales cos and sin
    "longrope": dict(
        short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0, original_max_position_embeddings=6
    ),
    "llama3": dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=6),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rotation(kind, ids):
    rope = dict(rope_type=kind, rope_theta=1e4, **SCALINGS[kind])
    length = 24 if "original_max_position_embeddings" in rope else 6
    model = make_model("llama", rope_parameters=rope, max_position_embeddings=length)
    a_patched_model_is_the_model_and_eq_2_to_4(model, ids, score="norms")


TEXT = dict(
    vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
SECTIONS = TEXT | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]))  # M-RoPE
TOWER = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2)
PATCHES = dict(image_size=28, patch_size=14)
BLOCKS = dict(hidden_size=32, intermediate_size=32, depth=6, num_heads=2, out_hidden_size=64)
MULTIMODAL = {
    "glm4v": (SECTIONS, BLOCKS),
    "llava": (dict(model_type="llama", **TEXT), dict(model_type="clip_vision_model", **TOWER, **PATCHES)),
    "mistral3": (dict(model_type="mistral", **TEXT), dict(model_type="pixtral", **TOWER, **PATCHES)),
    "qwen2_5_vl": (SECTIONS, BLOCKS),
    "qwen2_vl": (SECTIONS, dict(depth=6, embed_dim=32, num_heads=2, hidden_size=64)),
    "qwen3_vl": (SECTIONS, BLOCKS),
}


@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_text_tower_of_a_multimodal_model_is_adapted_and_nothing_else(family, ids):
    torch.manual_seed(0)
    text, vision = MULTIMODAL[family]
    config = CONFIG_MAPPING[family](text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config).eval()
    before = logits(model, ids)
    # An image's tokens stand at a time, a row and a column, each of which turns its section of the pairs.
    places = {"position_ids": torch.randint(0, 9, (3, *ids.shape))} if text is SECTIONS else {}
    placed = model(ids, use_cache=False, **places).logits
    rosa.patch(model, CONFIG)
    torch.testing.assert_close(logits(model, ids), before, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(model(ids, use_cache=False, **places).logits, placed, atol=2e-6, rtol=2e-6)
    adapted = [name for name, module in model.named_modules() if name.endswith(".roae")]
    assert len(adapted) == 2 and all("language_model" in name for name in adapted)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("language_model" in name for name in trained)
    rosa.unpatch(model)
    assert torch.equal(logits(model, ids), before)

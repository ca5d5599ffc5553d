"""A tiny model of every family that transformers maps to causal language models, and what RoSA makes of it.

`python -m tests.rosa.families` writes `docs/models.md`; `test_models.py` checks every family, and the page.
"""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rosa
from rosa.models.decoder import decoder_layers
from rosa.models.probe import rotary_sites

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
PARAMETERS = 20_000_000  # more is not tiny

# For every configuration that has a field of the name.
SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    moe_intermediate_size=16, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, shared_expert_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, index_head_dim=32, n_layer=4, n_embd=64, n_head=4,
    rotary_dim=16, n_positions=128, d_model=64, n_heads=4, n_layers=4, max_seq_len=128, ffn_dim=48,
    mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8, global_head_dim=32,
    vocab_size_per_layer_input=96, hidden_size_per_layer_input=8,
)  # fmt: skip
LATENT = dict(num_key_value_heads=4)  # multi-head latent attention
TEXT = dict(
    vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
)  # fmt: skip
VISION = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
HYBRID = dict(layer_types=["linear_attention", "full_attention"] * 2)
# Where the sizes above do not go together, or layers of a kind are wanted that four layers would not have.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": dict(LATENT, layer_types=["linear_attention", "full_attention"] * 2),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "blt": dict(encoder_hash_byte_group_vocab=96),
    "blt_local_decoder": dict(hidden_size_global=64),
    "blt_local_encoder": dict(hidden_size_global=64),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={t: dict(rope_type="default", rope_theta=1e4) for t in ("sliding_attention", "full_attention")},
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2, hidden_size=64),
    ),
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": dict(n_shared_experts=1),
    "dots3_note_text": dict(LATENT, n_shared_experts=1, layer_types=["indexed_attention", "sliding_attention"] * 2),
    "falcon_h1": dict(mamba_d_ssm=128),
    "fuyu": dict(text_config=dict(model_type="persimmon", **TEXT), image_size=28, patch_size=14),
    "falcon": dict(head_dim=..., num_kv_heads=2, new_decoder_architecture=True),
    "gemma3n_text": dict(
        num_kv_shared_layers=1, layer_types=["sliding_attention", "full_attention"] * 2, intermediate_size=[48] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": dict(num_kv_shared_layers=1, layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma3": dict(vision_config=dict(model_type="siglip_vision_model", **VISION)),
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "got_ocr2": dict(
        text_config=dict(model_type="qwen2", **TEXT),
        vision_config=dict(hidden_size=32, output_channels=16, num_hidden_layers=1, num_attention_heads=2, mlp_dim=32),
    ),
    "gpt_oss": dict(num_experts_per_tok=2),
    "granitemoehybrid": dict(HYBRID, position_embedding_type="rope"),
    "kimi_linear": LATENT,
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "longcat_flash": LATENT,
    "minicpm3": LATENT,
    "qwen4_exp_text": dict(
        layer_types=["linear_attention", "indexed_attention"] * 2, indexer_n_heads=2, indexer_kv_heads=1,
        indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2, hc_lowrank=8, linear_key_head_dim=16,
        linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
    ),
    "youtu": LATENT,
    "zamba2": dict(
        layer_types=["linear_attention", "hybrid"] * 2, hybrid_layer_ids=[1, 3], mamba_headdim=16, n_mamba_heads=8,
        attention_hidden_size=128, attention_head_dim=32, use_mem_rope=True, head_dim=...,
    ),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def tiny_config(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The family's configuration at tiny size."""
    return _with_sizes(CONFIG_MAPPING[family], OWN_SIZES.get(family, {}) | changes)


def _with_sizes(config_class: type, own: dict[str, Any]) -> Any:
    fields = {*getattr(config_class, "__dataclass_fields__", ()), *getattr(config_class, "attribute_map", ())}
    sizes = {name: value for name, value in SIZES.items() if name in fields} | own
    for name, part in config_class.sub_configs.items():
        if hasattr(part, "model_type") and name not in own:
            sizes[name] = _with_sizes(part, OWN_SIZES.get(part.model_type, {}))
    return config_class(**{name: value for name, value in sizes.items() if value is not ...})


def make_model(family: str, device: str = "cpu", **changes: Any) -> nn.Module:
    """A tiny model of the family, in float32 and for inference."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="eager").eval()
    if device != "meta":
        with torch.no_grad():  # initial weights are so small that attention is nearly uniform
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


class Finding(NamedTuple):
    """What RoSA makes of a family: "supported", "refused" or "not built", and in words how or why."""

    family: str
    status: str
    words: tuple[str, ...]


@functools.cache
def find(family: str) -> Finding:
    """Builds the family's tiny model without values and probes it."""
    model, problem = blank_model(family)
    if model is None:
        return Finding(family, "not built", (problem,))
    try:
        sites = rotary_sites(model)
    except rosa.UnsupportedModelError as error:
        return Finding(family, "refused", (_one_line(str(error)),))
    size = sum(p.numel() for p in model.parameters())
    if problem or size > PARAMETERS:
        return Finding(family, "not built", (problem or f"{size:,} parameters at the smallest size tried",))
    layers = decoder_layers(model)
    adapted = len({site.layer.name for site in sites})
    layouts = dict.fromkeys(_layout(site.shape) for site in sites)
    scored = [norm for layer in layers for norm in layer.scored_norms]
    by_norms = all(getattr(norm, "weight", None) is not None for norm in scored) and all(x.scored_norms for x in layers)
    return Finding(
        family,
        "supported",
        (type(model).__name__, f"{adapted} of {len(layers)}", "; ".join(layouts), "norms" if by_norms else "adapter"),
    )


def blank_model(family: str) -> tuple[nn.Module | None, str | None]:
    """A model without values, tiny or, with what went wrong there, of the default size: enough to see it refused."""
    try:
        return make_model(family, "meta"), None
    except Exception as error:
        problem = _one_line(f"{type(error).__name__}: {error}")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family]()), problem
    except Exception:
        return None, problem


def _layout(shape) -> str:
    layout = shape.layout
    pairs = "2i, 2i + 1" if layout.interleaved or layout.deinterleaves else "i, i + R/2"
    part = "" if layout.rotary_dim == shape.head_dim else f", {layout.rotary_dim} of {shape.head_dim}"
    kind = ", one key head" if shape.key_heads == 1 else ""
    kind += ", complex" if layout.columns == "complex" else ""
    kind = ", queries alone" if shape.key_heads == 0 else kind
    return pairs + part + ("" if layout.sign == 1 else ", other sign") + kind


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "/")[:300]


def page(findings: list[Finding]) -> str:
    """`docs/models.md`."""
    of = {status: [f for f in findings if f.status == status] for status in ("supported", "refused", "not built")}
    rows = "\n".join(f"| {f.family} | {' | '.join(f.words)} |" for f in of["supported"])
    refused: dict[str, list[str]] = {}
    for f in of["refused"]:
        refused.setdefault(re.sub(r"^\w+For\w+|^\w+LMHeadModel|^\w+Decoder\b", "The model", f.words[0]), []).append(
            f.family
        )
    refusals = "\n".join(f"| {reason} | {', '.join(families)} |" for reason, families in refused.items())
    missing = "\n".join(f"| {f.family} | {f.words[0]} |" for f in of["not built"])
    return f"""# Models

All {len(findings)} families that transformers {transformers.__version__} maps to causal language models, at tiny size:
{len(of["supported"])} supported, {len(of["refused"])} refused, {len(of["not built"])} not built.
Made by `python -m tests.rosa.families`.

No family is named in the code. `rosa.patch` runs a blank twin of each attention module, watches which rotary function
it calls and with what, and compares that function with RoPE in every known layout.
`tests/rosa/adapters/test_models.py` patches a tiny model of each supported family: it computes what it computed before,
to float32 rounding, then something else once W_up is not zero; its gradients are those of Eq. 2 to 4 written by hand;
layer selection ranks its layers, as the last column says; and after `rosa.unpatch` it computes bitwise what it did at
first.

## Supported

- layers: how many of the tiny model's decoder layers are adapted. The others have no rotary attention: state-space,
  convolution and linear-attention layers, cross-attention, and layers without position embeddings.
- pairs: which elements of a head RoPE rotates together, and how many of them where it rotates a part of the head.
- DLS score: "norms" is Eq. 5; "adapter" where norms have no weights to rank layers by
  (`DynamicLayerSelection(..., score="adapter")`).

Of multimodal models the text tower is adapted, and nothing else: tested with GLM-4V, LLaVA, Mistral 3, Qwen2-VL,
Qwen2.5-VL and Qwen3-VL, the rotation by sections of an image (M-RoPE) of four of them included.

In 16 bits Zaya wants `RosaConfig(train_norms=False)` or `adapter_dtype="bfloat16"`: its layers cast what they add up to
the dtype of their norms. BLT's patcher, which transformers runs without gradients, is given adapters that do not train.

| family | class | layers | pairs | DLS score |
| --- | --- | --- | --- | --- |
{rows}

## Refused

`rosa.patch` raises `rosa.UnsupportedModelError` with this reason, before anything has changed.

| reason | families |
| --- | --- |
{refusals}

## Not built

What the tests do not build at tiny size. `rosa.patch` may well take the real model, or says why it does not.

| family | what happened |
| --- | --- |
{missing}
"""


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page([find(family) for family in FAMILIES]), encoding="utf-8")

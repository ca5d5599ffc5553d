"""The attention block of a decoder layer, forward and backward: projections, RoPE, RoAE and attention."""

from __future__ import annotations

import pytest

from benchmarks.backbones import LAYER_CASES, PROVIDERS, layer_inputs, maybe_compiled, one_layer, trained
from benchmarks.passes import one_pass


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def bench_attention(measure, monkeypatch, case, provider):
    model = one_layer(case, provider, monkeypatch)
    hidden_states, others = layer_inputs(model, case)
    attention = model.layers[0].self_attn
    leaves = trained(attention, hidden_states)
    function = maybe_compiled(attention, provider)
    run = one_pass("both", lambda: function(hidden_states=hidden_states, **others)[:1], leaves)
    measure(run, group="attention", provider=provider, mode="both", **case.labels)

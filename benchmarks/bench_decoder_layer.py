"""A whole decoder layer, forward and backward: norms, attention and MLP; RoSA's norms train."""

from __future__ import annotations

import pytest

from benchmarks.backbones import LAYER_CASES, PROVIDERS, layer_inputs, maybe_compiled, one_layer, trained
from benchmarks.passes import one_pass


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def bench_decoder_layer(measure, monkeypatch, case, provider):
    model = one_layer(case, provider, monkeypatch)
    hidden_states, others = layer_inputs(model, case)
    layer = model.layers[0]
    leaves = trained(layer, hidden_states)
    function = maybe_compiled(layer, provider)
    run = one_pass("both", lambda: (function(hidden_states, **others),), leaves)
    measure(run, group="decoder_layer", provider=provider, mode="both", **case.labels)

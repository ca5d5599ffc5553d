"""Whether layers are selected, and by which score, where nothing else is said: as the paper of each adapter has it."""

from __future__ import annotations

from rosa.adapters.config import AdapterConfig, RoadConfig

SELECTED = ("rosa",)  # the methods whose papers select layers
ADALORA_SELECTS = (
    "AdaLoRA shares out ranks by the gradients of all layers at every step, and under layer selection most have none"
)


def selects(method: str) -> bool:
    """Whether a method trains under layer selection unless it is told not to: RoSA does, RoAd and peft's do not."""
    return method in SELECTED


def default_score(config: AdapterConfig | None) -> str:
    """What ranks the layers unless something is chosen: the norms (Eq. 5 of RoSA's paper), and "adapter" for a RoAd
    whose norms do not train. RoSA's frozen norms, and those beside peft's adapters (None), get gradients for the score
    alone."""
    return "adapter" if isinstance(config, RoadConfig) and not config.train_norms else "norms"

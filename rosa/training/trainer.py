"""`RosaTrainer`: a SelectiveTrainer with adapters of RoSA or RoAd for checkpoints."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME

from rosa.adapters.config import RoadConfig
from rosa.adapters.disk import load_adapter
from rosa.adapters.parameters import trainable_parameters
from rosa.adapters.plan import method_of
from rosa.adapters.record import is_patched, patched
from rosa.adapters.road_plan import refuse_overwriting
from rosa.adapters.saving import save_adapter
from rosa.adapters.switching import active_adapter
from rosa.models.sharding import shard_state, whole_state
from rosa.training.resuming import unloadable_told
from rosa.training.selecting import default_score, selects
from rosa.training.selective_trainer import SelectiveTrainer

AUTO = "auto"


class RosaTrainer(SelectiveTrainer):
    """A `transformers.Trainer` for a model that `rosa.patch` has patched.

    It wraps the optimizer in DynamicLayerSelection, where layers are selected, logs every selection, saves the adapter
    alone at checkpoints, resumes from it, and stops at a loss that is not finite on any rank, before the optimizer has
    moved; the last checkpoint stays as it is. In batches of text that are padded on the left it counts positions from
    each row's first token, as `generate` does.

    A checkpoint is the same in a single process, under DDP and under FSDP2: a run under any of them resumes from it.
    Under DeepSpeed it has DeepSpeed's own files too, from which a run of as many processes under DeepSpeed resumes.

    Args:
        model (nn.Module): a patched model; its active adapter trains.
        args (TrainingArguments, optional): as for Trainer.
        dls (mapping, None or "auto"): keyword arguments of DynamicLayerSelection, which has the paper's defaults; None
            trains every layer at every step. "auto" is as the adapter's paper has it: {} for RoSA, None for RoAd. A
            RoAd whose norms do not train is scored by its own gradients (score="adapter") if nothing else is said.
            With `torch_compile=True` and mode "skip" each decoder layer is compiled on its own.
        **kwargs: SelectiveTrainer's and Trainer's other arguments.

    Attributes:
        layer_selection (DynamicLayerSelection or None): the wrapped optimizer, once training has begun.

    Raises:
        ValueError: the model is not patched, `dls` is another word than "auto", Accelerate is configured for FSDP1, or
            DeepSpeed for an optimizer of its own, or Liger's MLPs would overwrite what RoAd of variant 1 keeps.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        dls: Mapping[str, Any] | Literal["auto"] | None = AUTO,
        **kwargs: Any,
    ):
        if not is_patched(model):
            raise ValueError(f"RosaTrainer trains patched models: call rosa.patch on this {type(model).__name__} first")
        with _carrying_an_adapter(model):
            super().__init__(model, args, dls=_selection(model, dls), **kwargs)  # applies Liger's kernels
        config = patched(model)[1].active_adapter.config
        if isinstance(config, RoadConfig):
            refuse_overwriting(model, config)
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("RosaTrainer runs under FSDP2: set fsdp_version to 2 in the configuration of FSDP")
        self.data_collator = functools.partial(count_positions, self.data_collator)

    def _check_checkpoint(self, checkpoint: Path) -> None:
        super()._check_checkpoint(checkpoint)
        by_deepspeed = any(checkpoint.glob("global_step*"))
        if by_deepspeed != self.is_deepspeed_enabled:
            raise ValueError(
                f"{checkpoint} was {'' if by_deepspeed else 'not '}written under DeepSpeed, which keeps the state of "
                "training in a form of its own: resume as it was written, or begin a run from its adapter alone "
                "(rosa.load_adapter)"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # Trainer takes what requires gradients, and an earlier selection may have frozen some.
        for parameter in trainable_parameters(self.model):
            parameter.requires_grad_(True)
        return super().create_optimizer(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)  # Trainer would gather the whole base first
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        # Shards are brought by all ranks, and one writes.
        if self.args.should_save or self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            save_adapter(self.model, output_dir)
        if not self.args.should_save:
            return
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        load_adapter(model, resume_from_checkpoint, active_adapter(model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP2 too the optimizer's state is one file of whole tensors, and the base is not saved."""
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer = whole_state(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(optimizer, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        with unloadable_told(checkpoint, OPTIMIZER_NAME, SCHEDULER_NAME):
            optimizer, scheduler = (
                torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            )
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.optimizer.load_state_dict(shard_state(optimizer, parameters))
            self.lr_scheduler.load_state_dict(scheduler)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        load_adapter(self.model, self.state.best_model_checkpoint, active_adapter(self.model))


def _selection(model: nn.Module, dls: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    """The keyword arguments of layer selection, what was left to the active adapter decided."""
    if isinstance(dls, str) and dls != AUTO:
        raise ValueError(f'dls must be arguments of DynamicLayerSelection, None or "{AUTO}", got {dls!r}')
    config = patched(model)[1].active_adapter.config
    if dls == AUTO:
        dls = {} if selects(method_of(config)) else None
    return None if dls is None else {"score": default_score(config), **dls}


def count_positions(collate: Callable[[list], Any], rows: list) -> Any:
    """A batch of text with positions counted from each row's first token, where rows are padded on the left.

    `generate` counts so, and a model left to itself counts the padding too. RoPE alone does not mind: attention sees
    the distance of two tokens. RoAE scales the parts of a rotated pair each by itself, and sees where a token stands.
    """
    batch = collate(rows)
    text_alone = isinstance(batch, Mapping) and batch.keys() <= {"input_ids", "attention_mask", "labels"}
    mask = batch.get("attention_mask") if text_alone else None
    if isinstance(mask, Tensor) and mask.ndim == 2 and (mask[:, 0] == 0).any():
        batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return batch


@contextmanager
def _carrying_an_adapter(model: nn.Module) -> Iterator[None]:
    """Trainer refuses a quantized model that carries no adapter, and looks for PEFT's mark of one."""
    marks = [m for m in model.modules() if getattr(m, "_hf_peft_config_loaded", None) is False]
    for module in marks:
        module._hf_peft_config_loaded = True
    try:
        yield
    finally:
        for module in marks:
            module._hf_peft_config_loaded = False

"""`SelectiveTrainer`: transformers' Trainer with layer selection and a stop at a broken loss, for any model."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rosa.models.decoder import decoder_layers
from rosa.models.sharding import local
from rosa.selection.log import LogSelections
from rosa.selection.optimizer import DynamicLayerSelection
from rosa.selection.zero import check_optimizer_is_used, layer_groups
from rosa.storage.files import replace_text
from rosa.training.response_logits import ResponseLogits
from rosa.training.resuming import MADE_WITH_NAME, fault, last_checkpoint, unloadable_told, unsaved_told
from rosa.training.selecting import ADALORA_SELECTS
from rosa.training.speed import Speed


class SelectiveTrainer(Trainer):
    """A `transformers.Trainer` whose optimizer trains the selected layers only, whatever makes them trainable.

    It logs every selection (`rosa.selection.log`), and stops at a loss that is not finite on any rank, before the
    optimizer has moved; the last checkpoint stays as it is. Parameters that are not finite after a step are never
    saved: every checkpoint and the end of training look at them all.

    Args:
        model (nn.Module, optional): a model with decoder layers; None where Trainer's `model_init` makes it, anew for
            every training.
        args (TrainingArguments, optional): as for Trainer.
        dls (mapping or None): keyword arguments of DynamicLayerSelection, which has the paper's defaults; None trains
            every layer at every step. With `torch_compile=True` and mode "skip" each decoder layer is compiled on its
            own.
        norm_learning_rate (float, optional): the learning rate of the decoder layers' norms, which follows the schedule
            too; None gives them that of all else.
        response_logits (bool): in training, compute logits at positions whose next token has a label, and at no other.
            Loss and gradients are the same but for rounding. The first step tries it out; where it is not exact, and
            for batches of more than text, all logits are computed, with a warning. So it is in evaluation for the loss
            alone, once training has begun.
        made_with (mapping, optional): what JSON can hold, written into every checkpoint as `made_with.json`; on the
            process that saves.
        **kwargs: Trainer's other arguments.

    Attributes:
        layer_selection (DynamicLayerSelection or None): the wrapped optimizer, once training has begun.
        speed (Speed): what the steps of this process took.

    Raises:
        ValueError: `norm_learning_rate` is not above 0, DeepSpeed is configured for an optimizer of its own, or layers
            are to be selected beside AdaLoRA; when training begins, norms that do not train were given a learning rate.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        dls: Mapping[str, Any] | None = None,
        norm_learning_rate: float | None = None,
        response_logits: bool = True,
        made_with: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        if norm_learning_rate is not None and not (math.isfinite(norm_learning_rate) and norm_learning_rate > 0):
            raise ValueError(f"norm_learning_rate must be a number above 0, got {norm_learning_rate}")
        self.dls, self.norm_learning_rate, self.made_with = dls, norm_learning_rate, made_with
        self.response_logits = response_logits
        self._response: ResponseLogits | None = None  # while training lasts
        super().__init__(model, args, **kwargs)
        if self.is_deepspeed_enabled and dls is not None:
            check_optimizer_is_used(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        configs = getattr(self.model, "peft_config", {}).values()
        if dls is not None and any(config.peft_type == "ADALORA" for config in configs):
            raise ValueError(f"{ADALORA_SELECTS}: use dls=None, or another method such as LoRA")
        self.layer_selection: DynamicLayerSelection | None = None
        self._grouping = torch.Generator()
        self.add_callback(LogSelections(self))
        self.speed = Speed()
        self.add_callback(self.speed)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all ranks a second, of the steps since training began or was resumed in this process; None before
        the first step, and where tokens are not counted (`include_num_input_tokens_seen`)."""
        return self.speed.tokens / self.speed.seconds if self.speed.tokens else None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Trains as `Trainer.train` does; `resume_from_checkpoint=True` takes the last checkpoint that is complete.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the checkpoint is not complete, or was written under another kind of engine.
            FloatingPointError: the loss or a parameter is no longer finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise FileNotFoundError(f"{self.args.output_dir} holds no complete checkpoint to resume from")
        if resume_from_checkpoint:
            self._check_checkpoint(Path(resume_from_checkpoint))
        try:
            with self._room_for_variants():
                made = super().train(resume_from_checkpoint, **kwargs)
            self._check_parameters()
            return made
        finally:
            if self.layer_selection is not None:
                self.layer_selection.unfreeze()
            if self._response is not None:
                self._response.remove()
            self._response, self.is_in_train = None, False  # after an error too

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """Raises ValueError where training cannot go on from a checkpoint."""
        found = fault(checkpoint)
        if found is not None:
            raise ValueError(f"training cannot go on from {checkpoint}: {found}")

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self._compiles_layers:
            self.accelerator.state.dynamo_plugin.use_regional_compilation = True

    @property
    def _compiles_layers(self) -> bool:
        """Whether each decoder layer is compiled on its own: one graph of them all would not outlive a selection."""
        return self.args.torch_compile and self.dls is not None and self.dls.get("mode") != "mask"

    def _room_for_variants(self) -> AbstractContextManager:
        """Lets torch.compile keep the four graphs of a layer (it trains or not, its input requires gradients or not)
        for every one that it keeps otherwise, such as those of batches with padding and without."""
        if not self._compiles_layers:
            return nullcontext()
        return torch._dynamo.config.patch(recompile_limit=4 * torch._dynamo.config.recompile_limit)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.layer_selection = None  # that of an earlier training goes with its model, which model_init makes anew
        super().create_optimizer(*args, **kwargs)
        if not _has_reentrant_checkpoints(self.model):
            # With gradient checkpointing, transformers lets the embeddings' output require gradients. Only reentrant
            # checkpoints need that, and with it backward could not stop at the lowest layer that trains.
            self.model.disable_input_require_grads()
        if self.norm_learning_rate is not None:
            groups = _with_norms_apart(self.model, self.optimizer.param_groups, self.norm_learning_rate)
            self.optimizer.param_groups = groups
        if self.dls is not None and self.layer_selection is None:
            if self.is_deepspeed_enabled:
                self.optimizer.param_groups = layer_groups(self.model, self.optimizer.param_groups)
            self.optimizer = self.layer_selection = DynamicLayerSelection(self.optimizer, self.model, **self.dls)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.generator = self._grouping
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Rows grouped by length come in an order of the epoch, as random ones do: Trainer leaves it to what was drawn
        # before, which a resumed run has not drawn.
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._grouping.manual_seed(seed + math.floor(self.state.epoch or 0))
        # Resumed from a checkpoint of its last step, within an epoch, Trainer would make one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float | None:
        return super()._clip_grad_norm(self._clipped(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        return super()._get_grad_norm(self._clipped(model), grad_norm)

    def _clipped(self, model: nn.Module) -> nn.Module:
        """A module of the parameters whose gradients are clipped together: those that the optimizer holds.

        At a step that selects, norms have gradients for the score alone. They would have the others clipped away: they
        are larger, no GradScaler unscales them, and until `step` they are each rank's own. DeepSpeed clips by itself.
        """
        if self.layer_selection is None or self.is_deepspeed_enabled:
            return model
        return nn.ParameterList(self._held)

    @property
    def _held(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_parameters()
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with unsaved_told(checkpoint, checkpoint.parent):
            if self.made_with is not None and self.args.should_save:
                checkpoint.mkdir(parents=True, exist_ok=True)
                replace_text(checkpoint / MADE_WITH_NAME, json.dumps(self.made_with, indent=1))
            super()._save_checkpoint(model, trial)

    def _check_parameters(self) -> None:
        """Raises FloatingPointError, on every rank, where a trained parameter is not finite on any.

        The loss cannot tell: it is that of the values before the step.
        """
        finite = all(bool(torch.isfinite(local(parameter)).all()) for parameter in self._held)
        if not self.accelerator.gather(torch.tensor([finite], device=self.args.device)).all():
            raise FloatingPointError(
                f"parameters are no longer finite after step {self.state.global_step}; nothing of them is saved, and "
                "the last checkpoint stays. The usual cause is a learning rate too high"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with unloadable_told(checkpoint, OPTIMIZER_NAME, SCHEDULER_NAME):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with unloadable_told(checkpoint, "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        try:
            return super().create_scheduler(*args, **kwargs)
        except TypeError as error:
            given = self.args.lr_scheduler_kwargs
            if not given:
                raise
            raise ValueError(
                f"lr_scheduler_kwargs {given} do not fit the schedule {self.args.lr_scheduler_type}: {error}"
            ) from error

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        ordinary = functools.partial(super().compute_loss, model, num_items_in_batch=num_items_in_batch)
        if return_outputs or not (self.is_in_train and self.response_logits):
            return ordinary(inputs, return_outputs)
        if self._response is None:
            self._response = ResponseLogits(model)
            obstacle = self._wants_all_logits()
            if obstacle is None:
                self._response.try_out(ordinary, self.args.device)
            else:
                self._response.leave(obstacle)
        with self._response.of(inputs) as inputs:
            return ordinary(inputs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if self._response is None or not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with self._response.of(self._prepare_inputs(inputs)) as inputs:
            return super().prediction_step(model, inputs, True, ignore_keys)

    def _wants_all_logits(self) -> str | None:
        """What in this Trainer wants the logits of every position, or has each process see a part of a batch alone."""
        if self.compute_loss_func is not None:
            return "compute_loss_func may read any of them"
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if self.args.n_gpu > 1 or (parallel is not None and (parallel.cp_enabled or parallel.sp_enabled)):
            return "batches are split between devices within a step"
        return None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        # Of every rank: its gradients have reached all others, and none may save what they would make.
        losses = self.accelerator.gather(loss)
        if not torch.isfinite(losses).all():
            raise FloatingPointError(
                f"the loss is {losses.tolist()} in step {self.state.global_step + 1}; training stops here and the last "
                "checkpoint stays. Usual causes: a learning rate too high, or rows in which every label is masked"
            )
        return loss


def _with_norms_apart(model: nn.Module, groups: Sequence[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """Param groups in which the decoder layers' norms have a learning rate of their own. They stand last: Trainer logs
    the rate of the first."""
    norms = {id(p) for layer in decoder_layers(model) for norm in layer.norms.values() for p in norm.parameters()}

    def part(group: dict[str, Any], *, of_norms: bool) -> dict[str, Any]:
        return group | {"params": [p for p in group["params"] if (id(p) in norms) == of_norms]}

    apart = [part(group, of_norms=True) | {"lr": rate} for group in groups]
    if not any(group["params"] for group in apart):
        raise ValueError(f"norm_learning_rate is {rate}, but no norm of the decoder layers trains: leave it out")
    return [group for group in (*(part(group, of_norms=False) for group in groups), *apart) if group["params"]]


def _has_reentrant_checkpoints(model: nn.Module) -> bool:
    functions = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    return any(getattr(function, "keywords", {}).get("use_reentrant", False) for function in functions)

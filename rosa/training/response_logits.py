"""Logits of the response alone: the output layer and the loss see no position but those that have something to predict.

With the prompt masked most logits are computed for nothing, and they are the largest tensor of a training step. Here
the decoder's last hidden states at the labelled positions are gathered into one row, the labels with them, and the
model goes on as it would with any row: its own output layer, caps, scales and loss, and what the Trainer makes of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rosa.data.tokens import IGNORED_LABEL
from rosa.models.decoder import text_decoder

# A batch of text, padded or packed without padding. Where there is more, such as an image, hidden states may stand at
# other places than labels.
_TEXT = {
    "input_ids", "attention_mask", "position_ids", "labels", "seq_idx",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip
_ROUNDING = 1e-5  # of a loss in float32
_SCALE = 16.0  # of the probe's hidden states: logits lie apart, also where the output layer is as it was initialised


class ResponseLogits:
    """Gathers what a model's decoder returns, once `try_out` has found that the model's loss stays the same. It leaves
    alone batches of more than text. Where it does nothing, it says so once.

    Args:
        model (nn.Module): a causal language model, which may be wrapped by any engine. Until `remove` it has a hook.
    """

    def __init__(self, model: nn.Module):
        self._decoder = text_decoder(model)
        self._positions: Tensor | None = None
        self._obstacle: str | None = "it has not been tried out"
        self._warned = False
        self._hook = self._decoder.register_forward_hook(self._gather)

    def try_out(self, loss: Callable[[dict[str, Any]], Tensor], device: torch.device) -> None:
        """Runs a small batch both ways. In several processes all of them must.

        Its last hidden states are replaced by such that the output layer maps without rounding, and each to other
        logits: the losses agree if they are the same function. They do not where a model does not shift its labels,
        looks beyond a position after its decoder, or has a loss that tells rows apart.

        Args:
            loss (callable): the model's loss of a batch, as training computes it.
            device (torch.device): of the batches.
        """
        batch = _probe_batch(device)
        devices = [] if device.type == "cpu" else [device]

        def computed(inputs: dict[str, Any]) -> Tensor:
            # It is to leave no trace: no random numbers drawn, nothing compiled for shapes that never come again.
            with torch.random.fork_rng(devices, device_type=device.type), torch.compiler.set_stance("force_eager"):
                return loss(inputs)

        known = self._decoder.register_forward_hook(_known, prepend=True)
        try:
            with torch.no_grad():
                ordinary = computed(dict(batch))
                with self.gathering(batch) as gathered:
                    alone = computed(gathered)
            if ordinary.dtype not in (torch.float32, torch.float64):
                self._obstacle = f"a loss in {ordinary.dtype} does not tell whether it is the same"
            elif torch.allclose(alone, ordinary, rtol=_ROUNDING, atol=0):
                self._obstacle = None
            else:
                self._obstacle = f"the loss would be another ({alone:.6} in place of {ordinary:.6})"
        except Exception as error:  # whatever it is that the model cannot do with such a row
            self._obstacle = f"the model does not take it ({type(error).__name__}: {' '.join(str(error).split())})"
        finally:
            known.remove()

    def leave(self, obstacle: str) -> None:
        """Does nothing, for a reason that a model's loss does not tell."""
        self._obstacle = obstacle

    @contextmanager
    def of(self, batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """While this lasts, the model computes the logits `[1, labelled + 1, vocabulary]` of a batch.

        Args:
            batch (mapping): the model's inputs. Its `labels` `[rows, length]` stand at the tokens themselves: the model
                shifts them.

        Yields:
            mapping: the same inputs with `labels` `[1, labelled + 1]`, for the model to shift; or the batch itself.
        """
        beyond_text = ", ".join(sorted(batch.keys() - _TEXT))
        obstacle = self._obstacle or (f"a batch has {beyond_text} beside its text" if beyond_text else None)
        if obstacle is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"logits are computed at every position, not at the labelled ones alone: {obstacle}. "
                "response_logits=False asks for them all",
                stacklevel=2,
            )
        if obstacle is not None or "labels" not in batch:
            yield batch
            return
        with self.gathering(batch) as gathered:
            yield gathered

    def remove(self) -> None:
        """Leaves the model as it was."""
        self._hook.remove()

    @contextmanager
    def gathering(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """`of` a batch of text with labels, whatever `try_out` has found."""
        self._positions, labels = labelled(batch["labels"])
        try:
            yield {**batch, "labels": labels}
        finally:
            self._positions = None

    def _gather(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._positions is None:
            return output
        return _with_last(output, lambda h: h.flatten(0, 1).index_select(0, self._positions.to(h.device))[None])


def labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions whose next token has a label.

    Args:
        labels (Tensor): `[rows, length]`, the label of each token at its own place.

    Returns:
        tuple of Tensor: `[n + 1]`, these positions, counted through all rows, and one more that predicts nothing, as
        the last of a row does; and `[1, n + 1]`, labels that are those of the positions when they have been shifted.
    """
    targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, 1:].flatten()
    positions = (targets != IGNORED_LABEL).nonzero().flatten()
    shifted_back = torch.cat([targets.new_tensor([IGNORED_LABEL]), targets[positions]])
    return torch.cat([positions, positions.new_zeros(1)]), shifted_back[None]


def _probe_batch(device: torch.device) -> dict[str, Tensor]:
    """Two rows, unevenly labelled and padded."""
    ids = torch.tensor([[3, 1, 4, 1, 5, 2], [2, 6, 5, 3, 0, 0]], device=device)
    labels = ids.clone()
    labels[0, :2] = labels[1, :3] = labels[1, 4:] = IGNORED_LABEL
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _known(module: nn.Module, args: tuple, output: Any) -> Any:
    """Hidden states with one element each that is not zero: the sums of the output layer's products are exact."""

    def one_hot(h: Tensor) -> Tensor:
        rows, length, width = h.shape
        places = torch.arange(rows * length, device=h.device).view(rows, length) % width
        return _SCALE * F.one_hot(places, width).to(h.dtype)

    return _with_last(output, one_hot)


def _with_last(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a decoder returned, its last hidden states changed."""
    if isinstance(output, tuple):
        return change(output[0]), *output[1:]
    output.last_hidden_state = change(output.last_hidden_state)
    return output

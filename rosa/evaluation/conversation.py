"""A conversation with a model, whose answers come word by word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from rosa.data.prompt_form import CHAT
from rosa.data.prompts import chat_ids, question_ids
from rosa.evaluation.generation import check_text, evaluating, greedy, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Conversation:
    """The turns so far of a conversation with a model, and its next answer.

    Args:
        model (PreTrainedModel): a causal language model, with its adapter if it has one.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        form (str): one of `rosa.data.prompt_form.FORMS`; of CHAT alone the turns so far are part of a question. It
            may be set anew, with another adapter.
        system (str, optional): what the system says first, of CHAT.
        max_new_tokens (int): most tokens of an answer.
        temperature (float, optional): of sampling; 0 is greedy, None is as the model's own generation config has it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        form: str,
        system: str | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
    ):
        self.model, self.tokenizer, self.form = model, tokenizer, form
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self._turns: list[dict[str, str]] = [*self._first]
        self._asked: tuple[list[int], str] | None = None

    def ask(self, text: str, say: Callable[[str], None], stopped: Callable[[], bool] = lambda: False) -> None:
        """Asks, and remembers question and answer, also one that was stopped.

        Args:
            text (str): the question.
            say (callable): is given the answer in pieces as they come.
            stopped (callable): is asked after each token whether to stop.

        Raises:
            ValueError: the question is no text, the chat template cannot be used, or the conversation has become longer
                than the model's positions. It is as before then.
        """
        check_text(text)
        turn = {"role": "user", "content": text}
        if self.form == CHAT:
            ids = chat_ids([*self._turns, turn], self.tokenizer)
        else:
            ids = question_ids(self.form, self.tokenizer, text)
        answer = self._answer(ids, self.form, say, stopped)
        self._asked = ids, self.form
        if answer:
            self._turns += [turn, {"role": "assistant", "content": answer}]

    def ask_again(self, say: Callable[[str], None], stopped: Callable[[], bool] = lambda: False) -> None:
        """Asks the last question as it was asked, of the model as it is now, and remembers nothing.

        Args, Raises: those of `ask`; a ValueError where nothing was asked yet.
        """
        if self._asked is None:
            raise ValueError("nothing was asked yet")
        self._answer(*self._asked, say, stopped)

    def _answer(self, ids: list[int], form: str, say: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        if not ids:
            raise ValueError("the question holds no token")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and len(ids) >= positions:
            raise ValueError(f"with its {len(ids)} tokens this is longer than the model's {positions} positions")
        stop = stop_ids(self.model, self.tokenizer, form)
        streamer = _Streamer(self.tokenizer, stop, say)
        ends = {"max_new_tokens": self._max_new_tokens, "eos_token_id": stop, "pad_token_id": stop[0]}
        options, given = self._decoding() | ends, torch.tensor([ids], device=self.model.device)
        with evaluating(self.model):
            self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stopped(stopped)]),
                tokenizer=self.tokenizer,  # by which a generation config's stop_strings are found
                **options,
            )
        return "".join(streamer.said)

    def _decoding(self) -> dict[str, object]:
        if self._temperature == 0:
            return greedy(self.model)
        sampling = {} if self._temperature is None else {"do_sample": True, "temperature": self._temperature}
        return {"num_beams": 1, "num_return_sequences": 1, **sampling}  # more of them could not be streamed


class _Streamer(TextStreamer):
    """Hands on the new text in whole words, without the white space around it and without what ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: list[int], say: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = torch.tensor(stop)
        self.say, self.said, self._space = say, [], ""

    def put(self, value: torch.Tensor) -> None:
        super().put(value[~torch.isin(value, self.stop)])

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = self._space + text if self.said else text.lstrip()
        words = text.rstrip()
        self._space = text[len(words) :]
        if words:
            self.said.append(words)
            self.say(words)


class _Stopped(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.stopped(), dtype=torch.bool, device=input_ids.device)

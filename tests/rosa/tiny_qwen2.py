"""A Qwen2 small enough to train in a test, and a byte-level BPE tokenizer learnt from the test's own text."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rosa.data.prompt_form import CHAT
from rosa.data.tokens import tokenize

EOS, PAD, BOS = "<|endoftext|>", "<|pad|>", "<|bos|>"
TURN_END = "<|end|>"  # of the chat template below, which is not the end of a text
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TAUGHT = (("A?", "one"), ("B?", "two"))


def tiny_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 512, template: str = "$A", pad: bool = True
) -> PreTrainedTokenizerFast:
    """`template` says what the tokenizer adds to a text, as "<|bos|> $A" or "$A <|endoftext|>"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD, BOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    special_ids = [(token, tokenizer.token_to_id(token)) for token in (EOS, BOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_ids)
    names = {"eos_token": EOS, "bos_token": BOS} | ({"pad_token": PAD} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_model(vocab_size: int, *, initializer_range: float = 0.02, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=initializer_range,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def save_base(folder: Path, rows: Iterable[dict], *, seed: int = 0) -> Path:
    """A folder with a tiny model and a tokenizer that has learnt the instructions and outputs of rows."""
    tokenizer = tiny_tokenizer([row["instruction"] + row["output"] for row in rows], vocab_size=300)
    tiny_model(len(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def taught_to_chat(*, special: bool = True) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A model that has learnt, as `rosa train` teaches it, to answer "one" or "two", and what ends its turn.

    Args:
        special (bool): whether TURN_END is one of the tokenizer's special tokens or an added one alone.
    """
    tokenizer = tiny_tokenizer(["one two"], vocab_size=300)
    tokenizer.add_tokens([TURN_END], special_tokens=special)
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in TAUGHT]
    rows = [{"messages": one + other, "first": 0} for one, other in (turns, turns[::-1])]
    model = tiny_model(len(tokenizer))
    examples = tokenize(rows, tokenizer, form=CHAT, train_on_prompt=True)  # so that it knows what to say after its turn
    batch = DataCollatorForSeq2Seq(tokenizer)([dict(example) for example in examples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer

"""A token's output does not depend on how its text is batched: alone, padded right or left, or packed unpadded."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, TrainingArguments

import rosa

LENGTHS = (13, 5, 9)


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture
def model(family, make_patched):
    """Wide weights make RoAE's part in the output large; the sliding window is shorter than two of the texts."""
    return make_patched(family, num_hidden_layers=2, initializer_range=0.3).eval()


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def alone(model, texts):
    return torch.cat([logits(model, input_ids=text[None])[0] for text in texts])


def padded(texts, side):
    width = max(map(len, texts))
    ids, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        columns = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[row, columns], mask[row, columns] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def packed(texts, **options):
    inputs = DataCollatorWithFlattening(return_tensors="pt", **options)(
        [{"input_ids": text.tolist()} for text in texts]
    )
    assert inputs["input_ids"].shape == (1, sum(LENGTHS)) and "attention_mask" not in inputs
    return inputs


def test_padding_on_the_right(model, texts):
    inputs = padded(texts, "right")
    assert distance(logits(model, **inputs)[inputs["attention_mask"].bool()], alone(model, texts)) < 1e-5


def test_padding_on_the_left(model, texts):
    inputs = padded(texts, "left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # as `generate` counts them
    outputs = logits(model, **inputs, position_ids=positions)[inputs["attention_mask"].bool()]
    assert distance(outputs, alone(model, texts)) < 1e-5


@pytest.mark.parametrize("lengths_too", [False, True], ids=["positions", "positions and lengths"])
def test_packed_without_padding(model, texts, lengths_too):
    inputs = packed(texts, return_flash_attn_kwargs=lengths_too)
    del inputs["labels"]
    assert distance(logits(model, **inputs)[0], alone(model, texts)) < 1e-5


def gradients(model, inputs):
    model.zero_grad()
    # transformers sees that texts are packed only where there is no cache; Trainer switches it off.
    model(**inputs, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_packed_gradients_equal_padded_ones(model, texts):
    inputs = padded(texts, "right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    ours, theirs = gradients(model.train(), packed(texts)), gradients(model, inputs)
    assert all(gradient.norm() > 0 for gradient in theirs.values())
    assert max(distance(ours[name], theirs[name]) for name in theirs) < 1e-4


def test_rosa_trainer_counts_positions_behind_padding_on_the_left(make_patched, texts, tmp_path):
    def train(side):
        def collate(rows):
            inputs = padded([row["input_ids"] for row in rows], side)
            first = inputs["attention_mask"].cumsum(-1) == 1  # which padding on the left would have to predict
            return inputs | {"labels": inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | first, -100)}

        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, learning_rate=1.0, optim="sgd", per_device_train_batch_size=3, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip
        model = make_patched(num_hidden_layers=2, initializer_range=0.3)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        data = [{"input_ids": text} for text in texts]
        rosa.RosaTrainer(model, arguments, train_dataset=data, data_collator=collate).train()
        return {name: p.detach() - before[name] for name, p in model.named_parameters() if name in before}

    left, right = train("left"), train("right")
    assert max(distance(left[name], right[name]) for name in right) < 1e-4

"""The model card of a RoAd adapter, and what it says to run."""

import pytest
import torch
from huggingface_hub import ModelCard

import rosa
from tests.rosa.tiny_qwen2 import tiny_tokenizer


@pytest.mark.parametrize("train_norms", [False, True])
def test_the_card_of_a_road_adapter_names_the_method_and_counts_what_it_trains(make_model, tmp_path, train_norms):
    model = make_model()
    model.config.name_or_path = "somebody/qwen2-tiny"
    rosa.patch(model, rosa.RoadConfig(variant=4, train_norms=train_norms))
    rosa.save_adapter(model, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["rosa", "road", "adapter", "qwen2"] and card.data.base_model == "somebody/qwen2-tiny"
    norms = 4 * 2 * 32 if train_norms else 0
    trained = rosa.count_parameters(model)[0]
    assert "# RoAd adapter for somebody/qwen2-tiny" in card.text
    assert f"{trained:,} parameters, {norms} of them norm weights, trained with RoAd" in card.text
    assert "arxiv.org/abs/2409.00119" in card.text and "2511.21733" not in card.text
    assert "| `variant` | 4 |" in card.text and "| `targets` | all-linear |" in card.text


def test_the_card_of_a_rosa_adapter_says_nothing_of_road(make_patched, tmp_path):
    rosa.save_adapter(make_patched(), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["rosa", "adapter", "qwen2"]
    assert "RoSA adapter" in card.text and "arxiv.org/abs/2511.21733" in card.text and "RoAd" not in card.text


def test_what_the_card_says_to_run_runs(make_model, batch, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer(["some words"]).save_pretrained(tmp_path / "base")
    model = rosa.patch(make_model(), rosa.RoadConfig())
    for parameter in rosa.trainable_parameters(model):
        torch.nn.init.normal_(parameter)
    rosa.save_adapter(model, tmp_path / "adapter")
    code = (tmp_path / "adapter" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/the/base/model", str(tmp_path / "base"))
    code = code.replace("path/to/this/folder", str(tmp_path / "adapter"))
    found = {}
    exec(code, found)
    assert torch.equal(found["model"](**batch).logits, model.eval()(**batch).logits)
    assert found["tokenizer"]("some")["input_ids"]

"""The page of the quickstart leads to its end, word for word, with a tiny model under the real one's name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rosa.follow_quickstart import BLOCK, PAGE
from tests.rosa.hub_server import TOKEN, Hub
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
MODEL, ADAPTER = "HuggingFaceTB/SmolLM2-135M-Instruct", "you/harbour-library"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def hub(tmp_path):
    """A hub with a tiny model of the real one's name, whose tokenizer knows the words of the page."""
    tokenizer = tiny_tokenizer([PAGE.read_text(encoding="utf-8")], vocab_size=600)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "base")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    hub = Hub()
    hub.repositories[MODEL] = {"private": False, "branches": {"main": files}, "commits": []}
    yield hub
    hub.stop()


def test_the_page_leads_to_its_end(hub, tmp_path):
    variables = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.rosa.follow_quickstart"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = dict(part.split("\n", 1) for part in done.stdout.split("$ ")[1:])
    looked, trained, asked, _, evaluated, of_base, pushed = told.values()
    (rows,) = [block for _, file, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if file == "rows.jsonl"]
    assert f"data: {len(rows.splitlines())} conversations, 1 file; prompts: chat" in looked and "learnt:" in looked
    assert "60/60  loss" in trained and "rosa chat --adapter out" in trained
    assert asked.strip() and "library" in evaluated and "library" in of_base
    assert json.loads((tmp_path / "out" / "prompt_form.json").read_text()) == {"form": "chat"}
    url, answer = pushed.split(">>>\n")
    assert url.startswith(f"{hub.url}/{ADAPTER}/commit/")
    assert asked.strip().startswith(answer.strip()[:40])  # of the same question, by the adapter on the hub
    assert hub.repositories[ADAPTER]["private"]

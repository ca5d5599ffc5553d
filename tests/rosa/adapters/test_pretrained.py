"""Loading a base: what is wrong with it is told by the name of the file; and the digests that tell bases apart."""

import json

import pytest

from rosa.adapters.pretrained import load_model, load_tokenizer
from rosa.storage.digest import base_digest, digest, file_digest, tokenizer_digest
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer


@pytest.fixture
def base(tmp_path):
    tokenizer = tiny_tokenizer(["some words"])
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "base", max_shard_size="200KB")
    return tmp_path / "base"


def test_a_whole_base_loads_and_keeps_its_digest(base):
    before = base_digest(str(base))
    assert load_model(str(base)).dtype == load_model(base, "float32").dtype
    assert load_tokenizer(base)("some")["input_ids"]
    (base / "README.md").write_text("other")
    assert base_digest(str(base)) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model-00002-of-00003.safetensors", b"", "model-00002-of-00003.safetensors is truncated"),
        ("config.json", b"", "config.json is damaged: no valid JSON"),
        ("config.json", b"5", "config.json is damaged: an object in JSON was expected"),
        ("config.json", b"null", "config.json is damaged: an object in JSON was expected"),
        ("config.json", b"[" * 100_000, "config.json is damaged: JSON nested too deeply"),
        ("config.json", b"\x80", "config.json is damaged: no valid JSON"),
        ("config.json", b'{"model_type": "nope"}', "no model can be loaded from"),
    ],
)
def test_a_damaged_model_is_told_by_its_file(base, file, content, message):
    if file.endswith("safetensors"):
        assert (base / file).is_file()
        content = (base / file).read_bytes()[:1000]
    (base / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_model(base)


@pytest.mark.parametrize("content", [b"", b"5", b"null", b"true", b"[" * 100_000, b"\x80"])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_told_by_its_file(base, file, content):
    (base / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"the tokenizer in .* cannot be loaded: {file}"):
        load_tokenizer(base)


def test_what_is_missing_is_named(base, tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="there is no folder /nowhere/at/all"):
            load("/nowhere/at/all")
        with pytest.raises(ValueError, match="can be loaded from user/nothing"):
            load("user/nothing")
    for file in base.glob("tok*"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(base)
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors"):
        load_model(base)


def test_our_own_mistakes_are_not_taken_for_faults_of_the_base(base):
    with pytest.raises(IndexError):
        load_model(base, dtype=object())


def test_digests_tell_contents_apart(base, tmp_path):
    before = base_digest(str(base)), tokenizer_digest(load_tokenizer(base))
    tokenizer = load_tokenizer(base)
    tokenizer(["a", "a much longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == before[1]  # what a call did is no other tokenizer
    tokenizer.add_tokens(["new"])
    assert tokenizer_digest(tokenizer) != before[1]
    shard = base / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    shard.write_bytes(content)
    assert base_digest(str(base)) != before[0]
    assert file_digest(shard) == file_digest(shard) != digest(json.dumps("x"))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})

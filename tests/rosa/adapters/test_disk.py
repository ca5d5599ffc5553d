"""Adapters on disk: what is saved comes back, what does not fit is refused, and a killed process leaves no half."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GlmConfig, GlmForCausalLM

import rosa
from rosa.adapters.plan import describe_base
from tests.rosa import families
from tests.rosa.tiny_qwen2 import tiny_tokenizer

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "rosa_config.json", "README.md"
FILES = [CARD, WEIGHTS, "config.json", CONFIG]


@pytest.fixture
def saved(make_patched, tmp_path):
    """A patched model and the folder that its adapter was saved in."""
    model = make_patched().eval()
    rosa.save_adapter(model, tmp_path / "out")
    return model, tmp_path / "out"


def edit(folder, change):
    """Rewrites a saved adapter's description, in both places, and its tensors."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        description = json.loads(file.metadata()["adapter_config"])
    tensors = load_file(folder / WEIGHTS)
    change(description, tensors)
    text = json.dumps(description)
    (folder / CONFIG).write_text(text)
    save_file(tensors, folder / WEIGHTS, metadata={"adapter_config": text})


def unchanged_after(model, error, message, source):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    patched = rosa.is_patched(model)
    with pytest.raises(error, match=message):
        rosa.load_adapter(model, source)
    after = dict(model.named_parameters())
    return (
        rosa.is_patched(model) == patched
        and before.keys() == after.keys()
        and all(torch.equal(before[n], after[n]) for n in before)
    )


def test_a_fresh_model_with_the_adapter_is_the_model_that_was_saved(family, make_model, make_patched, batch, tmp_path):
    model = make_patched(family, config=rosa.RosaConfig(rank=4, r_low=0.5, alpha=0.3)).eval()
    rosa.save_adapter(model, tmp_path)
    fresh = make_model(family).eval()
    assert rosa.load_adapter(fresh, tmp_path) is fresh
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert rosa.count_parameters(fresh) == rosa.count_parameters(model)


def test_the_folder_holds_the_roae_weights_the_norms_and_a_readable_description(saved):
    model, folder = saved
    assert sorted(os.listdir(folder)) == FILES
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(load_file(folder / WEIGHTS)) == names and len(names) == 4 * 6
    description = json.loads((folder / CONFIG).read_text())
    assert description["format_version"] == 1 and description["config"]["rank"] == 4
    assert description["base"] == {
        "model_type": "qwen2", "layers": 4, "hidden_size": 32, "heads": 4, "key_heads": 2, "head_dim": 16,
        "rotary_dim": 16, "interleaved": False, "columns": "first half", "sign": 1, "deinterleaves": False,
        "sequence_first": False,
    }  # fmt: skip


def test_equal_adapters_are_equal_files(saved, tmp_path):
    model, folder = saved
    for i in range(4):  # with two keys of metadata, safetensors writes them in one order or the other
        rosa.save_adapter(model, tmp_path / str(i))
        assert (tmp_path / str(i) / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_frozen_norms_and_some_layers(make_model, make_patched, batch, tmp_path):
    model = make_patched(config=rosa.RosaConfig(rank=4, train_norms=False, layers=(0, 2))).eval()
    rosa.save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 2 * 4
    assert torch.equal(rosa.load_adapter(make_model().eval(), tmp_path)(**batch).logits, model(**batch).logits)


def test_saving_while_layer_selection_has_layers_frozen_saves_all(make_patched, batch, tmp_path):
    model = make_patched().train()
    adamw = torch.optim.AdamW(rosa.trainable_parameters(model))
    optimizer = rosa.DynamicLayerSelection(adamw, model, interval=2, k_ratio=0.25)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    rosa.save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 4 * 6


def test_saving_once_another_library_has_replaced_the_rotary_function(make_patched, tmp_path, monkeypatch):
    model = make_patched("qwen2")
    rosa.save_adapter(model, tmp_path / "before")
    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.apply_rotary_pos_emb", lambda q, k, cos, sin: (k, q))
    rosa.save_adapter(model, tmp_path / "after")
    before, after = (tmp_path / name / WEIGHTS for name in ("before", "after"))
    assert after.read_bytes() == before.read_bytes()


def test_loading_into_a_patched_model(saved, make_patched, batch):
    model, folder = saved
    other = make_patched().eval()
    with torch.no_grad():
        other.model.layers[0].self_attn.roae.up.zero_()
    assert torch.equal(rosa.load_adapter(other, folder)(**batch).logits, model(**batch).logits)
    third = make_patched(config=rosa.RosaConfig(rank=8))
    assert unchanged_after(third, ValueError, r"'default' of .* has RosaConfig.*rank=8.*has RosaConfig.*rank=4", folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_hidden_layers=3), "another base: layers is 3 in this Qwen2ForCausalLM, 4 in"),
        (dict(hidden_size=16), "another base: hidden_size is 16"),
        (dict(num_attention_heads=8), "another base: heads is 8"),
        (dict(num_key_value_heads=4), "another base: key_heads is 4"),
        (dict(head_dim=32), "another base: head_dim is 32"),
        (dict(family="llama"), "another base: model_type is llama in this LlamaForCausalLM, qwen2 in"),
    ],
)
def test_an_adapter_of_another_base_is_refused_by_name(saved, make_model, changes, message):
    assert unchanged_after(make_model(**changes), rosa.AdapterError, message, saved[1])


OTHER_VALUES = {
    "model_type": "llama", "layers": 5, "hidden_size": 48, "heads": 8, "key_heads": 1, "head_dim": 32, "rotary_dim": 8,
    "interleaved": True, "columns": "even", "sign": -1, "deinterleaves": True, "sequence_first": True,
}  # fmt: skip


def test_every_field_of_the_base_is_compared(saved, make_model):
    model, folder = saved
    assert describe_base(model, rosa.RosaConfig()).keys() == OTHER_VALUES.keys()
    fresh, own = make_model(), describe_base(model, rosa.RosaConfig())
    for field, value in OTHER_VALUES.items():
        edit(folder, lambda description, _, field=field, value=value: description.update(base={**own, field: value}))
        message = f"another base: {field} is {own[field]} in this Qwen2ForCausalLM, {value} in its base$"
        assert unchanged_after(fresh, rosa.AdapterError, message, folder)


def test_all_differences_are_named_of_a_model_that_rotates_a_part_and_interleaves(saved, make_model, tmp_path):
    sizes = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    halves, quarters = (GlmForCausalLM(GlmConfig(**sizes, partial_rotary_factor=part)) for part in (0.5, 0.25))
    rosa.save_adapter(rosa.patch(halves, rosa.RosaConfig(rank=4)), tmp_path)
    message = "another base: rotary_dim is 4 in this GlmForCausalLM, 8 in its base$"
    assert unchanged_after(quarters, rosa.AdapterError, message, tmp_path)
    message = "model_type is glm .*, qwen2 in .*; rotary_dim is 8 .*, 16 in .*; interleaved is True .*, False in"
    assert unchanged_after(rosa.unpatch(halves), rosa.AdapterError, message, saved[1])


def test_missing_truncated_and_foreign_files(saved, make_model, tmp_path):
    folder, fresh = saved[1], make_model()
    assert unchanged_after(fresh, FileNotFoundError, "there is no adapter folder .*nowhere", tmp_path / "nowhere")
    assert unchanged_after(fresh, FileNotFoundError, "me/nothing is neither a folder here nor", "me/nothing")
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        assert unchanged_after(fresh, rosa.AdapterError, "is truncated or no safetensors file", folder)
    (folder / WEIGHTS).unlink()
    assert unchanged_after(fresh, FileNotFoundError, f"no complete adapter: {WEIGHTS} is missing", folder)
    save_file({"a": torch.zeros(1)}, folder / WEIGHTS)
    assert unchanged_after(fresh, rosa.AdapterError, "carries no RoSA configuration", folder)
    for text in ("[]", "{}", "nonsense"):
        save_file({"a": torch.zeros(1)}, folder / WEIGHTS, metadata={"adapter_config": text})
        assert unchanged_after(fresh, rosa.AdapterError, "carries (no|a) RoSA configuration", folder)
    (folder / CONFIG).unlink()
    assert unchanged_after(fresh, FileNotFoundError, f"{CONFIG} is missing", folder)


def test_an_unknown_format_version_and_an_unusable_configuration(saved, make_model):
    folder, fresh = saved[1], make_model()
    edit(folder, lambda description, _: description.update(format_version=2))
    assert unchanged_after(fresh, rosa.AdapterError, "format version 2, this RoSA reads 1", folder)
    edit(folder, lambda description, _: description.update(format_version=1, config={"rank": 4, "beta": 1}))
    assert unchanged_after(fresh, rosa.AdapterError, "unusable configuration.*beta", folder)


def test_weights_that_do_not_fit_the_configuration(saved, make_model):
    folder, fresh = saved[1], make_model()
    name = "model.layers.0.self_attn.roae.up"
    edit(folder, lambda _, tensors: tensors.update({name: torch.zeros(3, 3)}))
    assert unchanged_after(fresh, rosa.AdapterError, rf"{name} is \[3, 3\], expected \[16, 4\]", folder)
    edit(folder, lambda _, tensors: tensors.pop(name))
    assert unchanged_after(fresh, rosa.AdapterError, f"{name} is missing", folder)


def test_a_description_edited_by_hand_is_warned_of_and_not_used(saved, make_model):
    folder = saved[1]
    (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('"alpha": 0.1', '"alpha": 0.9'))
    with pytest.warns(UserWarning, match="differs from the configuration stored with the weights"):
        fresh = rosa.load_adapter(make_model(), folder)
    assert fresh.model.layers[0].self_attn.roae.alpha == 0.1


@pytest.mark.parametrize("base", [{}, {"layers": 4}])
def test_a_base_that_is_not_described_in_full_is_refused(saved, make_model, base):
    edit(saved[1], lambda description, _: description.update(base=base))
    assert unchanged_after(make_model(), rosa.AdapterError, "does not say .*head_dim, .* of its base", saved[1])


@pytest.mark.parametrize("version", [True, 1.0, "1", None])
def test_a_format_version_is_a_whole_number(saved, make_model, version):
    edit(saved[1], lambda description, _: description.update(format_version=version))
    assert unchanged_after(make_model(), rosa.AdapterError, f"has format version {version!r}, this", saved[1])


DTYPES = [torch.complex64, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["fresh", "patched"])
def test_values_of_other_dtypes_are_refused_before_anything_is_overwritten(saved, make_model, kind, dtype):
    name, folder = "model.layers.3.self_attn.roae.up", saved[1]
    edit(folder, lambda _, tensors: tensors.update({name: tensors[name].to(dtype)}))
    model = make_model() if kind == "fresh" else rosa.patch(make_model(seed=1), rosa.RosaConfig(rank=4))
    assert unchanged_after(model, rosa.AdapterError, f"{name} holds [A-Z0-9_]+, expected one of F32, F64", folder)


def test_four_bit_floats_are_refused_before_anything_is_overwritten(saved, make_model):
    name, folder = "model.layers.3.self_attn.roae.up", saved[1]
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][0])
    body, end = b"", 0
    for n in names:
        begin, stop = header[n]["data_offsets"]
        part = values[begin:stop]
        if n == name:
            header[n]["dtype"], part = "F4", part[: len(part) // 8]
        header[n]["data_offsets"] = [end, end + len(part)]
        body, end = body + part, end + len(part)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + body)
    model = rosa.patch(make_model(seed=1), rosa.RosaConfig(rank=4))
    assert unchanged_after(model, rosa.AdapterError, f"{name} holds F4, expected one of F32", folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite_in_the_adapters_dtype_are_not_loaded(saved, make_model, value):
    name, folder = "model.layers.2.input_layernorm.weight", saved[1]
    edit(folder, lambda _, tensors: tensors.update({name: torch.full((32,), value, dtype=torch.float64)}))
    for model in (make_model(), rosa.patch(make_model(), rosa.RosaConfig(rank=4))):
        assert unchanged_after(model, rosa.AdapterError, f"{name} holds values that are not finite", folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_not_saved(saved, value):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.model.layers[1].self_attn.roae.down[0, 0] = value
    with pytest.raises(FloatingPointError, match="layers.1.self_attn.roae.down holds values that are not finite"):
        rosa.save_adapter(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("rank", [10**12, 10**30])
def test_a_rank_that_the_file_does_not_bear_out_takes_no_memory(saved, make_model, rank):
    edit(saved[1], lambda description, _: description["config"].update(rank=rank))  # 10**12 would take 128 TB a layer
    message = rf"roae.down is \[4, 32\], expected \[{rank}, 32\]"
    assert unchanged_after(make_model(), rosa.AdapterError, message, saved[1])


def test_loading_draws_no_random_numbers(saved, make_model, make_patched):
    for model in (make_model(), make_patched()):
        before = torch.get_rng_state()
        rosa.load_adapter(model, saved[1])
        assert torch.equal(torch.get_rng_state(), before)
        rosa.load_adapter(model, saved[1], "second")
        assert torch.equal(torch.get_rng_state(), before)


def test_loading_draws_none_where_a_twin_on_the_cpu_is_followed(tmp_path):
    """Attention that chooses by values cannot be followed on the meta device."""
    model = families.make_model("jetmoe")
    rosa.save_adapter(rosa.patch(model, rosa.RosaConfig(rank=4)), tmp_path)
    rosa.unpatch(model)
    before = torch.get_rng_state()
    rosa.load_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_what_is_not_patched_or_has_no_values(make_model, tmp_path):
    with pytest.raises(ValueError, match="is not patched"):
        rosa.save_adapter(make_model(), tmp_path / "out")
    with pytest.raises(ValueError, match="is offloaded or on the meta device"):
        rosa.save_adapter(rosa.patch(make_model().to("meta")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("known", [True, False])
def test_loading_where_values_would_be_lost_is_refused(make_model, make_patched, tmp_path, known):
    rosa.save_adapter(make_patched(), tmp_path)
    model = make_model().to("meta")
    if known:
        rosa.patch(model, rosa.RosaConfig(rank=4))
    with pytest.raises(ValueError, match="is offloaded or on the meta device, and what is loaded .* lost"):
        rosa.load_adapter(model, tmp_path)
    assert rosa.is_patched(model) == known


def test_the_model_card_says_what_it_is_and_how_to_load_it(make_patched, tmp_path):
    model = make_patched()
    model.config.name_or_path = "somebody/qwen2-tiny"
    rosa.save_adapter(model, tmp_path)
    card = ModelCard((tmp_path / CARD).read_text())
    assert card.data.base_model == "somebody/qwen2-tiny" and card.data.base_model_relation == "adapter"
    assert card.data.library_name == "rosa" and {"rosa", "qwen2"} <= set(card.data.tags)
    trained = rosa.count_parameters(model)[0]
    assert f"{trained:,} parameters, {4 * 2 * 32} of them norm weights" in card.text
    assert "| `rank` | 4 |" in card.text and "| `layers` | 4 |" in card.text


def test_what_the_model_card_says_to_run_runs(make_model, make_patched, batch, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer(["some words"]).save_pretrained(tmp_path / "base")
    model = rosa.patch(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rosa.RosaConfig(rank=4)).eval()
    rosa.save_adapter(model, tmp_path / "out")
    text = (tmp_path / "out" / CARD).read_text()
    assert str(tmp_path) not in text  # where a model lies on this machine is nobody's business
    code = text.split("```python\n")[1].split("```")[0]
    for placeholder, folder in (("path/to/the/base/model", "base"), ("path/to/this/folder", "out")):
        assert placeholder in code
        code = code.replace(placeholder, str(tmp_path / folder))
    names = {}
    exec(code, names)
    assert torch.equal(names["model"].eval()(**batch).logits, model(**batch).logits)


def test_a_card_is_written_anew_unless_somebody_else_wrote_it(make_patched, tmp_path):
    rosa.save_adapter(make_patched(), tmp_path)
    first = (tmp_path / CARD).read_text()
    rosa.save_adapter(make_patched(config=rosa.RosaConfig(rank=8)), tmp_path)
    second = (tmp_path / CARD).read_text()
    assert "| `rank` | 4 |" in first and "| `rank` | 8 |" in second
    mark = next(line for line in second.splitlines() if "Take this line out" in line)
    for own in (second.replace(mark, "") + "Trained on sums.", "", "naïve".encode("latin-1")):
        own = own if isinstance(own, bytes) else own.encode()
        (tmp_path / CARD).write_bytes(own)
        rosa.save_adapter(make_patched(), tmp_path)
        assert (tmp_path / CARD).read_bytes() == own
    assert sorted(os.listdir(tmp_path)) == FILES


# Saves an adapter of ones, and then, in processes that die on the way, adapters of twos over it.
DIE_WHILE_SAVING = """
import os, resource, signal, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, Qwen2Config
import rosa
model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=96, hidden_size=32, intermediate_size=48,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16))
rosa.patch(model, rosa.RosaConfig(rank=4))

def save(value, folder):
    with torch.no_grad():
        for p in rosa.trainable_parameters(model):
            p.fill_(value)
    rosa.save_adapter(model, folder)

def at_size(limit):  # the kernel ends the process once a file that it writes grows past the limit
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def at_rename(count):
    seen = []
    def hook(event, args):
        if event == "os.rename":
            seen.append(args)
            if len(seen) == count:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

folder = Path(sys.argv[1])
save(1.0, folder / "whole")
size = (folder / "whole" / "adapter_model.safetensors").stat().st_size
deaths = [(at_size, n) for n in (0, 100, size // 2, size - 1)] + [(at_rename, n) for n in (1, 2, 3, 4)]
for number, (die, when) in enumerate(deaths):
    save(1.0, folder / str(number))
    child = os.fork()
    if child == 0:
        die(when)
        save(2.0, folder / str(number))
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_dies_while_it_saves_leaves_the_old_adapter(make_model, tmp_path):
    done = subprocess.run([sys.executable, "-c", DIE_WHILE_SAVING, tmp_path], capture_output=True, text=True)
    assert done.stdout.split() == [str(int(s)) for s in 4 * [signal.SIGXFSZ] + 4 * [signal.SIGKILL]], done.stderr
    for number in range(8):
        fresh = rosa.load_adapter(make_model(), tmp_path / str(number))
        assert all((p == 1).all() for p in rosa.trainable_parameters(fresh))
        rosa.save_adapter(fresh, tmp_path / str(number))  # what the dead process left behind is in nobody's way


# Over and over, a process that saves adapters of ones and of twos in turn is killed, and what it leaves is loaded.
KILL_WHILE_SAVING = """
import itertools, os, random, resource, signal, sys, time, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, Qwen2Config
import rosa
model = AutoModelForCausalLM.from_config(Qwen2Config(vocab_size=96, hidden_size=256, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64))
folder, moments = Path(sys.argv[1]), random.Random(0)

for value, name in ((1.0, "ones"), (2.0, "twos")):
    rosa.patch(model, rosa.RosaConfig(rank=64), name)
    with torch.no_grad():
        for p in rosa.trainable_parameters(model):
            p.fill_(value)
rosa.patch(model, rosa.RosaConfig(rank=64), "loaded")
rosa.save_adapter(model, folder, "ones")
seen, torn = set(), 0
for number in range(50):
    saved, say = os.pipe()
    child = os.fork()
    if child == 0:
        for name in itertools.cycle(("twos", "ones") if number % 2 else ("ones", "twos")):
            rosa.save_adapter(model, folder, name)
            os.write(say, b"x")
    for _ in range(number % 3):  # saves that end well
        os.read(saved, 1)
    time.sleep(moments.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(saved), os.close(say)
    torn += any(path.suffix == ".tmp" for path in folder.iterdir())
    rosa.load_adapter(model, folder, "loaded")
    (value,) = {v for p in rosa.trainable_parameters(model) for v in p.unique().tolist()}
    seen.add(value)
print(torn, *sorted(seen))
rosa.save_adapter(model, folder, "ones")
files = sorted(os.listdir(folder))
print(*(name for name in files if not name.endswith(".tmp")))

limit = (folder / "adapter_model.safetensors").stat().st_size // 2  # a disk that is full halfway
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    rosa.save_adapter(model, folder, "twos")
except OSError as error:
    print(error)
print(sorted(os.listdir(folder)) == files)
rosa.load_adapter(model, folder, "loaded")
print({v for p in rosa.trainable_parameters(model) for v in p.unique().tolist()})
"""


def test_an_adapter_is_whole_after_50_kills_and_a_full_disk(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILL_WHILE_SAVING, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    torn, files, error, files_after, values = done.stdout.splitlines() or [done.stderr]
    count, *seen = torn.split()
    assert int(count) > 5 and seen == ["1.0", "2.0"]  # the kills struck while files were written
    assert files.split() == FILES and files_after == "True"
    assert error.startswith(f"the adapter could not be saved in {tmp_path}: ") and "File too large" in error
    assert error.endswith("One that was there is whole") and values == "{1.0}"

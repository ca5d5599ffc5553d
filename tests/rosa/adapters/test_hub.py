"""push_to_hub and load_adapter by name, through huggingface_hub and over HTTP, against a stand-in of the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

import rosa
from rosa.data.prompt_form import save_form
from tests.rosa.conftest import make_model
from tests.rosa.hub_server import TOKEN, Hub
from tests.rosa.tiny_qwen2 import tiny_tokenizer

ROOT = Path(__file__).parents[3]
OURS, THEIRS, MODEL = "me/arithmetic", "me/with-a-card", "me/a-model"
FILES = {"README.md", "adapter_model.safetensors", "config.json", "rosa_config.json"}

# In a process of its own: huggingface_hub reads its address when it is imported. Prints one line for each step.
WORK = """
import contextlib, io, json, os, sys, torch
from transformers import AutoModelForCausalLM, Qwen2Config
import rosa
from rosa.adapters.folder import local_folder
from rosa.cli import main
from rosa.data.prompt_form import read_form
from tests.rosa.hub_server import TOKEN

def make():
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16)
    return AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).eval()

def filled(name, value):
    rosa.patch(model, rosa.RosaConfig(rank=4), name)
    with torch.no_grad():
        for parameter in rosa.trainable_parameters(model):
            parameter.fill_(value)

def say(call):
    try:
        print(json.dumps(call()), flush=True)
    except (Exception, SystemExit) as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)

def folder_pushed(name, folder, *options):
    # By the command; gives what it prints.
    printed = io.StringIO()
    os.environ["HF_TOKEN"] = TOKEN
    with contextlib.redirect_stdout(printed):
        main(["push", folder, name, *options])
    del os.environ["HF_TOKEN"]
    return printed.getvalue().strip()

def used(name, base):
    # What a pushed adapter, loaded by its name, has: the sum of its parameters, its chat template and its form.
    model, tokenizer = rosa.load(name, base=base, token=TOKEN)
    form = read_form(local_folder(name, token=TOKEN))
    return [sum(p.sum().item() for p in rosa.trainable_parameters(model)), tokenizer.chat_template, form]

def loaded(name, **options):
    fresh = rosa.load_adapter(make(), name, **options)
    return sorted({value.item() for p in rosa.trainable_parameters(fresh) for value in p.flatten()})

turned = rosa.patch(make(), rosa.RoadConfig(variant=1))
model = make()
filled("one", 1.0)
filled("two", 2.0)
for line in sys.stdin:
    say(eval(line, globals()))
"""


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    hub.repositories[THEIRS] = {"private": True, "branches": {"main": {"README.md": b"# Mine\n"}}, "commits": []}
    model = {"config.json": b'{"model_type": "qwen2"}', "README.md": b"# A model\n"}
    hub.repositories[MODEL] = {"private": False, "branches": {"main": model}, "commits": []}
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def ask(hub, tmp_path_factory):
    """Has a line of Python run in the process that talks to the hub, and gives its result, or [error, message]."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name and name != "HF_TOKEN"}
    environment |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path_factory.mktemp("home")), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", WORK],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def ask(line):
            process.stdin.write(f"lambda: {line}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def push(name, *, token=TOKEN, **options):
    return f"rosa.push_to_hub(model, {name!r}, token={token!r}, **{options!r})"


def load(name, *, token=TOKEN, **options):
    return f"loaded({name!r}, token={token!r}, **{options!r})"


def test_what_is_pushed_is_loaded_by_its_name(hub, ask):
    assert ask(push(OURS, private=True)) == f"{hub.url}/{OURS}/commit/{1:040x}"
    repository = hub.repositories[OURS]
    assert repository["private"] and repository["commits"] == [("main", "Upload a RoSA adapter")]
    assert set(repository["branches"]["main"]) == FILES
    card = ModelCard(repository["branches"]["main"]["README.md"].decode())
    assert card.data.library_name == "rosa" and "rosa.load_adapter(model" in card.text
    assert ask(load(OURS)) == [2.0]
    # Again, the other adapter: a commit more, and what is loaded is the new one.
    assert ask(push(OURS, adapter_name="one", commit_message="Better")) == f"{hub.url}/{OURS}/commit/{2:040x}"
    assert repository["commits"][1] == ("main", "Better") and ask(load(OURS)) == [1.0]


def test_a_road_adapter_is_pushed_under_its_own_name(hub, ask):
    assert ask(f"rosa.push_to_hub(turned, 'me/turned', token={TOKEN!r})").startswith(f"{hub.url}/me/turned/commit/")
    repository = hub.repositories["me/turned"]
    assert repository["commits"] == [("main", "Upload a RoAd adapter")]
    card = ModelCard(repository["branches"]["main"]["README.md"].decode())
    assert "road" in card.data.tags and "# RoAd adapter" in card.text
    assert ask(load("me/turned")) == [0.0, 1.0]


def test_branches_and_pull_requests(hub, ask):
    name = "me/branches"
    ask(push(name, adapter_name="one"))
    ask(push(name, adapter_name="two", revision="long"))
    ask(push(name, adapter_name="two", revision="long"))
    assert ask(load(name)) == [1.0] and ask(load(name, revision="long")) == [2.0]
    assert ask(push(name, adapter_name="two", create_pr=True)) == f"{hub.url}/{name}/discussions/1"
    assert ask(load(name)) == [1.0]
    error, message = ask(push(name, revision="new", create_pr=True))
    assert error == "ValueError" and "create_pr" in message
    assert "new" not in hub.repositories[name]["branches"]


def test_a_card_on_the_hub_that_somebody_wrote_stays(hub, ask):
    ask(push(THEIRS))
    files = hub.repositories[THEIRS]["branches"]["main"]
    assert files["README.md"] == b"# Mine\n" and set(files) == FILES and ask(load(THEIRS)) == [2.0]


def test_an_adapter_that_was_pushed_under_the_older_name(hub, ask):
    name = "me/older"
    ask(push(name, adapter_name="one"))
    files = hub.repositories[name]["branches"]["main"]
    files["adapter_config.json"] = files.pop("rosa_config.json")
    del files["config.json"]
    assert ask(load(name)) == [1.0]
    ask(push(name, adapter_name="two"))
    assert set(files) == FILES and ask(load(name)) == [2.0]


def test_a_repository_that_holds_a_model_is_refused(hub, ask):
    files = hub.repositories[MODEL]["branches"]["main"]
    before = dict(files)
    error, message = ask(push(MODEL))
    assert error == "ValueError" and f"{MODEL} on the hub holds a model (config.json): choose another" in message
    files |= {"model-00001-of-00002.safetensors": b"", "config.json": b"{}"}
    error, message = ask(push(MODEL))
    assert error == "ValueError" and "holds a model (model-00001-of-00002.safetensors)" in message
    assert files.keys() == before.keys() | {"model-00001-of-00002.safetensors"}


def test_refusals_say_what_to_do(hub, ask):
    for name, token in (("me/refused", "hf_bad"), ("somebody-else/model", TOKEN)):
        error, message = ask(push(name, token=token))
        assert error == "PermissionError" and f"did not let this token write to {name}: log in with" in message
        assert "HF_TOKEN" in message and "token=" not in message
    assert ask(push("not a name"))[0] == "HFValidationError"
    error, message = ask(push("me/refused", adapter_name="three"))
    assert error == "KeyError" and "no adapter 'three'; it has one, two" in message
    assert not {"me/refused", "somebody-else/model"} & set(hub.repositories)
    error, message = ask(load("me/nothing"))
    assert error == "FileNotFoundError" and "me/nothing is neither a folder here nor to be had from the hub" in message


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """As `rosa train` leaves it: an adapter of a base in a folder, and all that stands beside it."""
    folder = tmp_path_factory.mktemp("run")
    base, out = folder / "base", folder / "out"
    make_model().save_pretrained(base)
    tokenizer = tiny_tokenizer(["some words"], vocab_size=300)
    tokenizer.save_pretrained(base)
    rosa.save_adapter(rosa.patch(type(make_model()).from_pretrained(base), rosa.RoadConfig()), out)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(out)
    save_form(out, "chat")
    (out / "trainer_state.json").write_text('{"global_step": 3, "log_history": [{"step": 1, "loss": 0.5}]}')
    (out / "checkpoint-3").mkdir()
    for name in ("checkpoint-3/optimizer.pt", "training_args.bin", "log.txt", ".lock"):
        (out / name).write_bytes(b"not for the hub")
    return folder


def test_a_folder_is_pushed_with_all_that_using_it_takes_and_nothing_else(hub, ask, run_folder):
    name, base, out = "me/folder", run_folder / "base", run_folder / "out"
    url = ask(f"folder_pushed({name!r}, {str(out)!r}, '--private', '--message', 'Mine')")
    repository = hub.repositories[name]
    files = repository["branches"]["main"]
    assert url.startswith(f"{hub.url}/{name}/commit/") and repository["private"]
    assert repository["commits"] == [("main", "Mine")]
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(files) == FILES | tokenizer | {"prompt_form.json"}
    card = ModelCard(files["README.md"].decode())
    assert "| training loss, first logged | 0.5000 (step 1) |" in card.text and f'rosa.load("{name}"' in card.text
    trained = sum(p.sum().item() for p in rosa.trainable_parameters(rosa.load(out)[0]))
    assert ask(f"used({name!r}, {str(base)!r})") == [trained, "{{ messages }}", "chat"]


def test_a_folder_takes_the_place_of_an_adapter_of_another_kind(hub, ask, run_folder, tmp_path):
    name = "me/replaced"
    ask(f"folder_pushed({name!r}, {str(run_folder / 'out')!r})")
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    ask(f"folder_pushed({name!r}, {str(tmp_path)!r})")
    files = hub.repositories[name]["branches"]["main"]
    adapter = {file for file in files if "token" not in file and "template" not in file}
    assert adapter == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert b"# LORA adapter for" in files["README.md"]
    assert hub.repositories[name]["commits"][-1] == ("main", "Upload a LORA adapter")
    (tmp_path / "README.md").write_text("# Mine")
    ask(f"folder_pushed({name!r}, {str(tmp_path)!r}, '--revision', 'own')")
    assert hub.repositories[name]["branches"]["own"]["README.md"] == b"# Mine"


def test_without_a_network(hub, ask):
    ask(push("me/cached"))
    assert ask(load("me/cached")) == [2.0]
    hub.stop()
    try:
        error, message = ask(push("me/cached"))
        assert error == "ConnectionError" and f"me/cached could not be pushed to {hub.url}" in message
        assert ask(load("me/cached")) == [2.0]  # from the cache
        assert ask(load("me/other"))[0] == "FileNotFoundError"
    finally:
        hub.start()

"""`rosa merge`: what it saves is the merged model, whole, and one of transformers' own."""

import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import rosa
from rosa.cli import main
from rosa.data.prompt_form import CHAT, save_form

from .tiny_qwen2 import TAUGHT, taught_to_chat, tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
IDS = torch.arange(3, 35).view(2, 16)
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def attach(model, kind):
    if kind in ("rosa", "road"):
        return rosa.patch(model, rosa.RosaConfig(rank=4) if kind == "rosa" else rosa.RoadConfig(train_norms=True))
    config = {
        "lora": lambda: peft.LoraConfig(**LORA),
        "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
        "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
        "output layer": lambda: peft.LoraConfig(r=2, target_modules=["lm_head"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }[kind]
    return peft.get_peft_model(model, config())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base in float32 with a chat template and a generation config, whose output layer is the embedding."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer(["What is it?"], vocab_size=280)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = tiny_model(len(tokenizer), initializer_range=0.2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=0, max_new_tokens=7)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Makes an adapter of a kind, whose parameters are not where they began."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("adapter")
            model = attach(AutoModelForCausalLM.from_pretrained(base), kind)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                with torch.no_grad():
                    parameter += 0.05 * torch.randn_like(parameter)
            model.save_pretrained(made[kind])
            save_form(made[kind], CHAT)
        return made[kind]

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def error_of(capsys, *args, code=1):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["merge", *map(str, args)])
    assert exit.value.code == code
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["road", "lora", "dora", "ln_tuning"])
def test_what_is_saved_is_the_merged_model_and_one_of_transformers_own(base, adapter, kind, tmp_path, capsys):
    main(["merge", str(adapter(kind)), str(tmp_path / "new" / "merged")])
    merged = tmp_path / "new" / "merged"
    assert f"model  {merged}, " in (told := capsys.readouterr().out)
    assert f"base   {base}\nasked  by the chat template" in told

    model, _ = rosa.load(adapter(kind), device_map="cpu")
    adapted = logits(model)
    expected = logits(rosa.merge(model) if kind == "road" else model.merge_and_unload())
    found = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.equal(logits(found), expected)
    torch.testing.assert_close(expected, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1

    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        assert (merged / name).read_text() == (base / name).read_text()
    with safe_open(merged / "model.safetensors", "pt") as new, safe_open(base / "model.safetensors", "pt") as old:
        assert sorted(new.keys()) == sorted(old.keys())
    assert AutoTokenizer.from_pretrained(merged)("What is it?") == AutoTokenizer.from_pretrained(base)("What is it?")
    assert [path.name for path in merged.parent.iterdir()] == ["merged"]


def test_the_model_is_loaded_without_rosa(adapter, tmp_path):
    main(["merge", str(adapter("road")), str(tmp_path / "merged"), "--dtype", "bfloat16"])
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        "with torch.no_grad(): torch.save(model.eval()(torch.arange(3, 35).view(2, 16)).logits, 'logits')\n"
        "print(model.dtype, [name for name in sys.modules if name.startswith(('rosa', 'peft'))])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "torch.bfloat16 []", done.stderr
    model, _ = rosa.load(adapter("road"), dtype="bfloat16", device_map="cpu")
    assert torch.equal(torch.load(tmp_path / "logits"), logits(rosa.merge(model)))


def test_norms_that_were_trained_in_float32_are_of_the_models_dtype_again(adapter, tmp_path):
    main(["merge", str(adapter("ln_tuning")), str(tmp_path / "merged"), "--dtype", "bfloat16"])
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = list(file.keys())  # it is no mapping
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}


@pytest.fixture
def without_weights(base, tmp_path):
    """A copy of the base that cannot be loaded: an error that is not about that came before."""
    return shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("model.safetensors"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rosa", "RoSA's, which cannot be merged: what it does to queries and keys depends on the input"),
        ("prompt", "peft's PROMPT_TUNING, which cannot be merged: it adds tokens"),
    ],
)
def test_what_is_no_weight_is_refused_before_the_base_is_loaded(
    without_weights, adapter, kind, reason, tmp_path, capsys
):
    error = error_of(capsys, adapter(kind), tmp_path / "merged", "--model", without_weights)
    assert reason in error
    assert "no model can be loaded" in error_of(
        capsys, adapter("road"), tmp_path / "merged", "--model", without_weights
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_a_composition_and_a_quantized_base_are_refused_before_the_base_is_loaded(
    base, without_weights, adapter, tmp_path, capsys
):
    composed = rosa.compose(AutoModelForCausalLM.from_pretrained(base), tasks=("form", "skill"))
    rosa.save_composition(composed, tmp_path / "composition")
    assert "holds a composition, which cannot" in error_of(capsys, tmp_path / "composition", tmp_path / "merged")

    config = json.loads((without_weights / "config.json").read_text())
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (without_weights / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    error = error_of(capsys, adapter("road"), tmp_path / "merged", "--model", without_weights)
    assert f"{without_weights} was saved quantized" in error


def test_an_output_folder_that_holds_something_is_refused(adapter, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    assert "is there already, and not an empty folder" in error_of(capsys, "nowhere", tmp_path / "merged")
    assert "is there already" in error_of(capsys, "nowhere", tmp_path / "merged" / "notes.txt")
    assert "there is no adapter folder nowhere" in error_of(capsys, "nowhere", tmp_path / "other")
    assert "the following arguments are required: OUTPUT" in error_of(capsys, "nowhere", code=2)
    (tmp_path / "empty").mkdir()
    main(["merge", str(adapter("road")), str(tmp_path / "empty")])
    assert (tmp_path / "empty" / "config.json").is_file()


def test_what_cannot_be_merged_leaves_nothing_behind(base, adapter, tmp_path, capsys):
    error = error_of(capsys, adapter("output layer"), tmp_path / "merged")
    assert "they share one weight in its base" in error
    model = rosa.patch(AutoModelForCausalLM.from_pretrained(base), rosa.RoadConfig(targets=("q_proj",)))
    for name, parameter in model.named_parameters():
        if name.endswith("road.alpha"):
            parameter.data.zero_()
    rosa.save_adapter(model, tmp_path / "singular")
    assert "q_proj cannot be merged" in error_of(capsys, tmp_path / "singular", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["singular"]


def test_a_merged_model_ends_its_turns_as_the_adapter_has_learnt(tmp_path, capsys):
    model, tokenizer = taught_to_chat()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    rosa.save_adapter(rosa.patch(model, rosa.RoadConfig()), tmp_path / "adapter")
    save_form(tmp_path / "adapter", CHAT)
    main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--model", str(tmp_path / "base")])
    (asked, said), *_ = TAUGHT
    answer = pipeline("text-generation", str(tmp_path / "merged"))
    made = answer([{"role": "user", "content": asked}], max_new_tokens=12, do_sample=False)
    assert made[0]["generated_text"][-1]["content"] == said

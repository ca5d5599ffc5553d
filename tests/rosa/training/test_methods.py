"""The methods: training each through `rosa train`, the settings of peft's baselines, and adapters of every kind."""

import json
import os

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config, TrainerState, TrainingArguments

import rosa
from rosa.cli import main
from rosa.storage.settings import as_arguments
from rosa.training.adalora import AllocateRanks
from rosa.training.finetune import finetune
from rosa.training.methods import BASELINES, METHODS, attach, load_trained, norm_names, trainable
from rosa.training.parsing import parse
from rosa.training.selective_trainer import SelectiveTrainer
from tests.rosa.tiny_qwen2 import save_base, tiny_model

# What fits a model of hidden size 64.
SMALL = {"c3a": {"block_size": 16}, "adalora": {"init_r": 4, "target_r": 2}, "boft": {"boft_n_butterfly_factor": 1}}
ROWS = [{"instruction": f"Add {i} and {i}.", "output": str(2 * i)} for i in range(24)]


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """The reference backend, since Triton's interpreter has tests of its own; and afterwards the environment as it was:
    peft leaves CC and CXX behind where it cannot compile BOFT's extension."""
    before = dict(os.environ)
    os.environ["ROSA_BACKEND"] = "reference"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, ROWS)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder


def arguments(base, output, method, *more):
    settings = ["--peft", json.dumps(SMALL[method])] if method in SMALL else []
    files = ["--model", str(base), "--data", str(base / "rows.json"), "--output", str(output)]
    options = {"max_steps": 6, "val_size": 4, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    best = ["--load_best_model_at_end", "true", "--learning_rate", "0.01"]
    selection = ["--dls-interval", "2"] if method == "rosa" or "--dls" in more else []
    return ["train", *files, "--method", method, *settings, *as_arguments(options), *best, *selection, *more]


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(12)[None]).logits


def load(base):
    return AutoModelForCausalLM.from_pretrained(base)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_adapter_loads(base, tmp_path, method):
    main(arguments(base, tmp_path, method))
    before, after = logits(load(base)), logits(load_trained(load(base), tmp_path))
    assert not torch.allclose(before, after, atol=1e-5)
    best = json.loads((tmp_path / "trainer_state.json").read_text())["best_model_checkpoint"]
    torch.testing.assert_close(logits(load_trained(load(base), best)), after)


def test_a_resumed_run_ends_as_one_that_did_not_stop(base, tmp_path):
    main(arguments(base, tmp_path / "whole", "lora"))
    main(arguments(base, tmp_path / "parts", "lora"))
    (tmp_path / "parts" / "adapter_config.json").unlink()
    for part in (tmp_path / "parts").glob("checkpoint-6/trainer_state.json"):
        part.unlink()  # as if killed while writing it
    main(arguments(base, tmp_path / "parts", "lora", "--resume"))
    whole, parts = (logits(load_trained(load(base), tmp_path / name)) for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts)


def test_adalora_says_that_it_cannot_resume(base, tmp_path, capsys):
    main(arguments(base, tmp_path, "adalora"))
    with pytest.raises(SystemExit):
        main(arguments(base, tmp_path, "adalora", "--resume"))
    assert "adalora cannot go on from" in capsys.readouterr().err


def test_adalora_asks_for_two_steps(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*arguments(base, tmp_path, "adalora"), "--max_steps", "1"])
    assert "AdaLoRA needs at least 2 steps, and the run has 1" in capsys.readouterr().err


def test_adalora_under_layer_selection_is_refused_before_it_trains(base, tmp_path):
    model = attach(load(base), "adalora", settings=SMALL["adalora"])
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="AdaLoRA .*: use dls=None, or another method"):
        SelectiveTrainer(model, arguments, dls={}, callbacks=[AllocateRanks()])


def test_adaloras_best_checkpoint_loads_though_it_is_not_the_last(base, tmp_path):
    # The first of two checkpoints has the higher loss.
    main(arguments(base, tmp_path, "adalora", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"))
    best = json.loads((tmp_path / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert best.endswith("checkpoint-3")
    first, final = (logits(load_trained(load(base), folder)) for folder in (best, tmp_path))
    torch.testing.assert_close(first, final)


def test_lora_under_layer_selection_trains_the_selected_layers_alone(base, tmp_path):
    settings = json.dumps({"target_modules": ["q_proj", "k_proj"], "r": 4})
    main(arguments(base, tmp_path, "lora", "--peft", settings, "--dls", "true", "--dls-p-exploit", "1"))
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("dls/layers" in entry for entry in log) == 3
    names = [name for name, _ in load_trained(load(base), tmp_path).named_parameters() if "lora_" in name]
    assert names and all("q_proj" in name or "k_proj" in name for name in names)


def test_ln_tuning_under_layer_selection_and_its_norms_learn_at_their_own_rate(base, tmp_path):
    main(arguments(base, tmp_path, "ln_tuning", "--dls", "true", "--norm_learning_rate", "0.1"))
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert sum("dls/layers" in entry for entry in log) == 3
    tuned = {n: p for n, p in load_trained(load(base), tmp_path).named_parameters() if "ln_tuning_layers" in n}
    moved = {name: (weight - 1).abs().max() for name, weight in tuned.items()}
    last = moved.pop("base_model.model.model.norm.ln_tuning_layers.default.weight")
    assert len(moved) == 4 and 0 < last < 0.06 and max(moved.values()) > 0.12


def test_adalora_ends_with_the_ranks_that_it_aims_at(base, tmp_path):
    main(arguments(base, tmp_path, "adalora", "--load_best_model_at_end", "false"))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    assert sum(ranks) <= 2 * len(ranks) < 4 * len(ranks)
    assert config["total_step"] == 6


def test_the_papers_settings_reach_peft():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(num_hidden_layers=2))
    configs = {name: attach_config(name, model) for name in BASELINES if name != "ln_tuning"}
    assert {
        name: config.r for name, config in configs.items() if name in ("lora", "dora", "vera", "bone")
    } == dict.fromkeys(("lora", "dora", "vera", "bone"), 16)
    assert (configs["adalora"].init_r, configs["adalora"].target_r) == (32, 16)
    assert (configs["boft"].boft_block_size, configs["boft"].boft_dropout) == (4, 0.1)
    assert set(configs["boft"].target_modules) == {"q_proj", "v_proj"}
    assert configs["c3a"].block_size == 128
    assert configs["bone"].init_weights is True  # Bone itself, not Bat
    assert configs["dora"].use_dora and not configs["lora"].use_dora


def attach_config(name, model):
    config, settings = BASELINES[name]
    return getattr(peft, config)(**settings, **({"total_step": 1} if name == "adalora" else {}))


def test_lora_adapts_every_linear_layer_of_the_decoder_but_not_the_head(make_model):
    model = attach(make_model(), "lora")
    adapted = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_ln_tuning_trains_the_norms_of_the_layers_and_the_last_one(family, make_model):
    model = make_model(family)
    names = norm_names(model)
    assert "model.norm" in names and "model.layers.0.input_layernorm" in names
    assert not any("q_norm" in name or "k_norm" in name for name in names)
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    assert trainable(attach(model, "ln_tuning"))[0] == weights


def test_ln_tuning_trains_a_base_in_bfloat16_in_float32(base, tmp_path):
    model = load(base).bfloat16()
    before = logits(model)
    model = attach(model, "ln_tuning")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and {p.dtype for p in trained.values()} == {torch.float32}
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 1e-3  # which a bfloat16 of 1 does not hold
    model.save_pretrained(tmp_path)
    found = load_trained(load(base).bfloat16(), tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert all(torch.equal(found.get_parameter(name), p) for name, p in trained.items())


def test_adaloras_loss_in_evaluation_is_that_of_its_answers(base, tmp_path):
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = load(base).eval()(ids, labels=ids).loss
        model = attach(load(base), "adalora", settings=SMALL["adalora"])
        torch.testing.assert_close(model.eval()(ids, labels=ids).loss, plain)
        assert model.train()(ids, labels=ids).loss > plain + 0.1
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(load_trained(load(base), tmp_path).eval()(ids, labels=ids).loss, plain)


def test_adaloras_penalty_is_shared_out_over_the_passes_of_a_step(base, tmp_path):
    ids = torch.arange(12)[None]
    model = attach(load(base), "adalora", settings=SMALL["adalora"])
    args = TrainingArguments(str(tmp_path), gradient_accumulation_steps=4, use_cpu=True)

    def penalty():
        with torch.no_grad():
            return (model.train()(ids, labels=ids).loss - model.eval()(ids, labels=ids).loss).item()

    whole, weight = penalty(), model.peft_config["default"].orth_reg_weight
    AllocateRanks().on_train_begin(args, TrainerState(max_steps=6), None, model=model)
    assert penalty() == pytest.approx(whole / 4, rel=1e-4)
    assert model.peft_config["default"].orth_reg_weight == weight


def test_one_process_trains_on_one_gpu_with_the_rows_that_were_asked_for(base, tmp_path, capsys):
    job, args = parse(arguments(base, tmp_path, "lora", "--max_steps", "1", "--load_best_model_at_end", "false")[1:])
    args._n_gpu = 2
    trainer = finetune(job, args)
    assert trainer.args.train_batch_size == args.per_device_train_batch_size
    assert "of 2 GPUs this process takes the first" in capsys.readouterr().out


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("loara", {}, "unknown method 'loara'"),
        ("lora", {"rank": 4}, "unknown key rank"),
        ("lora", {"target_modules": ["qq_proj"]}, "lora does not fit Qwen2ForCausalLM"),
        ("c3a", {}, "c3a does not fit Qwen2ForCausalLM"),
        ("rosa", {"r": 4}, "settings of peft were given for RoSA"),
        ("road", {"r": 4}, "settings of peft were given for RoAd"),
    ],
)
def test_what_does_not_fit_is_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        attach(tiny_model(300), method, settings=settings)


@pytest.mark.parametrize("method", ["rosa", "road", "lora"])
def test_a_configuration_of_another_method_is_refused(method):
    model = tiny_model(300)
    other = rosa.RosaConfig() if method == "road" else rosa.RoadConfig()
    with pytest.raises(ValueError, match=f"a {type(other).__name__} was given for the method {method}"):
        attach(model, method, config=other)
    assert not rosa.is_patched(model)


def test_rosa_does_not_fit_a_model_without_rotation():
    with pytest.raises(rosa.UnsupportedModelError):
        attach(AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)), "rosa")


def test_an_adapter_of_another_base_is_refused(base, tmp_path, make_model):
    attach(load(base), "lora").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        load_trained(make_model(), tmp_path)


@pytest.fixture
def of_peft(base, tmp_path):
    attach(load(base), "lora").save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize(
    "content",
    [
        b"5",
        b"null",
        b"true",
        b"{}",
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"peft_type": "NONE"}',
        b'{"peft_type": 5}',
    ],
    ids=range(9),
)
def test_a_damaged_configuration_of_pefts_is_named(base, of_peft, content):
    (of_peft / "adapter_config.json").write_bytes(content)
    model = load(base)
    with pytest.raises(ValueError, match=r"lora/adapter_config.json is (damaged|no configuration of this peft)"):
        load_trained(model, of_peft)
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("change", [{"r": "four"}, {"target_modules": 5}, {"r": -1}, {"lora_alpha": None}], ids=str)
def test_a_configuration_of_pefts_that_peft_trips_over_is_named(base, of_peft, change):
    config = json.loads((of_peft / "adapter_config.json").read_text())
    (of_peft / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=f"{of_peft}"):
        load_trained(load(base), of_peft)


@pytest.mark.parametrize("length", [0, 7, 1000, -1])
def test_damaged_weights_of_pefts_are_named(base, of_peft, length):
    file = of_peft / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    model = load(base)
    with pytest.raises(ValueError, match="lora/adapter_model.safetensors is truncated or no safetensors file"):
        load_trained(model, of_peft)
    assert not any("lora_" in name for name, _ in model.named_parameters())
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        load_trained(model, of_peft)


def test_overwriting_a_run_removes_the_adapter_of_another_method(base, tmp_path):
    for method, more, gone in (
        ("rosa", (), ()),
        ("lora", ("--overwrite",), ("rosa_config.json", "config.json")),
        ("rosa", ("--overwrite",), ("adapter_config.json",)),
    ):
        main(arguments(base, tmp_path, method, "--max_steps", "1", "--load_best_model_at_end", "false", *more))
        assert not set(gone) & set(os.listdir(tmp_path))
        load_trained(load(base), tmp_path)


def test_no_adapter_at_all(base, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_trained(load(base), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        load_trained(load(base), tmp_path)

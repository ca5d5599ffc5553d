"""`rosa train --padding_free` learns what padded batches teach, and refuses models whose rows would see each other."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import rosa
from rosa.training.finetune import finetune
from rosa.training.padding_free import RowsApart, flattening, leak
from rosa.training.parsing import parse
from tests.rosa import families
from tests.rosa.conftest import FAMILIES
from tests.rosa.tiny_qwen2 import tiny_model, tiny_tokenizer
from tests.rosa.training.test_resuming import contents

ROWS = [
    {"instruction": f"Add {'one and ' * (7 * i % 20)}{i}.", "output": f"It is {i}" * (i % 3 + 1)} for i in range(20)
]

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module")
def tokenizer():
    """Without a token for padding: the end of a row stands for it."""
    return tiny_tokenizer([row["instruction"] + row["output"] for row in ROWS], vocab_size=300, pad=False)


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """In float64, so that no step of the run makes much of a rounding."""
    folder = tmp_path_factory.mktemp("model") / "base"
    tiny_model(len(tokenizer), initializer_range=0.3).double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.json"
    file.write_text(json.dumps(ROWS))
    return file


@pytest.fixture
def run(base, data, tmp_path):
    """Of 19 rows two epochs, in steps of two batches of three rows; the last batch has one."""

    def run(output, *more, base=base):
        options = (
            "--val_size 1 --num_train_epochs 2 --per_device_train_batch_size 3 --gradient_accumulation_steps 2 "
            "--optim sgd --learning_rate 0.1 --max_grad_norm 0 --logging_steps 1 --save_strategy no --disable_tqdm true"
        )
        files = ["--model", str(base), "--data", str(data), "--output", str(tmp_path / output)]
        return finetune(*parse([*files, *options.split(), *more]))

    return run


@pytest.fixture
def make_dense(make_patched):
    """RoSA with an effect, in a model with that attention and without a cache, as in training."""

    def make(family, attention, **options):
        model = make_patched(family, initializer_range=0.3, **options)
        model.set_attn_implementation(attention)
        model.config.use_cache = False
        return model

    return make


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


DLS = ["--dls_interval", "3"]


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "4", *DLS],
        ["--rank", "4", *DLS, "--dls_mode", "mask", "--train_on_prompt"],
        ["--rank", "4", "--dls", "false", "--gradient_checkpointing", "--attn_implementation", "eager"],
        ["--method", "road", "--train_sampling_strategy", "group_by_length"],
        ["--method", "lora", "--peft", '{"r": 4}', "--val_size", "5", "--per_device_eval_batch_size", "2"],
    ],
    ids=["skip", "mask, prompts too", "checkpointing, eager", "road, grouped", "lora"],
)
def test_a_run_learns_what_padded_batches_teach(run, tmp_path, options):
    padded, free = run("padded", *options), run("free", *options, "--padding_free")
    logs = [
        [(e["step"], name, e[name]) for e in trainer.state.log_history for name in ("loss", "eval_loss") if name in e]
        for trainer in (padded, free)
    ]
    assert len(logs[0]) >= 8 and [entry[:2] for entry in logs[0]] == [entry[:2] for entry in logs[1]]
    assert [entry[2] for entry in logs[1]] == pytest.approx([entry[2] for entry in logs[0]], rel=1e-6)
    assert logs[0][-1][2] < logs[0][0][2]  # it did learn
    assert free.state.num_input_tokens_seen == padded.state.num_input_tokens_seen
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("free", "padded"))
    assert max(distance(ours[name], theirs[name]) for name in theirs) < 1e-5


def test_the_batches_of_a_run_have_no_padding(run):
    batches = []
    trainer = run("free", "--max_steps", "1", "--padding_free")
    for batch in trainer.get_train_dataloader():
        batches.append(batch)
        assert batch.keys() == {"input_ids", "labels", "position_ids"}
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert len(batches) == 7 and sum(batch["input_ids"].numel() for batch in batches) == sum(lengths)
    assert sorted(torch.cat([(batch["position_ids"] == 0).sum(-1) for batch in batches]).tolist()) == [1, *[3] * 6]


@pytest.mark.parametrize(
    ("family", "attention"),
    [(name, "eager") for name in FAMILIES]
    + [(name, "sdpa") for name in FAMILIES if name != "gemma2"]  # which has none
    + [("qwen2", "flex_attention")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_keeps_rows_apart(make_dense, family, attention, dtype):
    model = make_dense(family, attention, dtype=dtype).train()
    assert leak(model, flattening(model)) < 1e-3
    assert model.training


def test_flash_attention_is_told_where_rows_begin(make_dense):
    model = make_dense("qwen2", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    batch = flattening(model)([{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}])
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert batch["max_length_q"] == batch["max_length_k"] == 3


@pytest.mark.parametrize("family", ["bamba", "falcon", "falcon_h1", "gpt_oss", "lfm2_moe", "mamba", "qwen3_next"])
def test_rows_that_see_each_other_are_found(family, tmp_path):
    model = families.make_model(family)
    model.config.use_cache = False
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"--padding_free is not for {family} with eager|sdpa attention: in a row of"):
        RowsApart(flattening(model)).on_train_begin(args, None, None, model)


def running_on(collate, rows):
    """A batch whose rows attend to themselves alone, with positions that run on: RoPE does not mind."""
    batch = collate(rows)
    row = (batch["position_ids"] == 0).cumsum(-1)
    count = torch.arange(row.shape[1])
    visible = (row[0, :, None] == row[0]) & (count[:, None] >= count)
    return batch | {"position_ids": count[None], "attention_mask": visible[None, None]}


def test_positions_that_run_on_from_the_row_before_are_found_where_roae_sees_them(make_dense, make_model):
    config = rosa.RosaConfig(rank=4, r_low=1.0)  # the highest frequencies turn far in the few tokens of a text
    model, plain = make_dense("llama", "sdpa", config=config), make_model("llama", initializer_range=0.3)
    assert leak(plain, functools.partial(running_on, flattening(plain))) < 1e-4
    assert leak(model, functools.partial(running_on, flattening(model))) > 0.02
    assert leak(model, flattening(model)) < 1e-4


def test_a_model_that_mixes_rows_is_refused_by_name_and_costs_no_file(run, tokenizer, data, tmp_path):
    hybrid = tmp_path / "hybrid"
    families.make_model("qwen3_next", vocab_size=300).save_pretrained(hybrid)
    tokenizer.save_pretrained(hybrid)
    run("out", "--rank", "4", "--max_steps", "1")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="^--padding_free is not for qwen3_next with sdpa attention: in a row of"):
        run("out", "--rank", "4", "--r_low", "0.5", "--max_steps", "1", "--overwrite", "--padding_free", base=hybrid)
    assert contents(tmp_path / "out") == before
    run("out", "--rank", "4", "--r_low", "0.5", "--max_steps", "1", "--overwrite", base=hybrid)


def test_one_process_for_several_gpus_is_refused(make_dense, tmp_path):
    model, args = make_dense("llama", "sdpa"), TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="--padding_free makes one row of a batch, which one process cannot share out"):
        RowsApart(flattening(model)).on_train_begin(args, None, None, model)


@pytest.mark.parametrize(
    ("attention", "message"), [("flash_attention_3", "FlashAttention3"), ("fast", '`attn_implementation="fast"`')]
)
def test_an_attention_that_is_not_there_is_told(run, attention, message):
    with pytest.raises(ValueError, match=f"^no model can be loaded from .*: .*{message}"):
        run("out", "--attn_implementation", attention)


def test_rosa_trainer_takes_the_collator(make_dense, tmp_path):
    """Outside of `rosa train` it is the data collator, and the check a callback."""
    model = make_dense("qwen2", "sdpa")
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (5, 9, 7, 4)]
    collator = flattening(model)
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = rosa.RosaTrainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[RowsApart(collator)])
    trainer.train()
    assert trainer.state.global_step == 2

"""Fine-tunes a model with RoSA by RosaTrainer, which is transformers' Trainer with layer selection.

python examples/rosa_trainer.py --model Qwen/Qwen2.5-0.5B --data rows.json --output out
torchrun --nproc_per_node 2 examples/rosa_trainer.py ...

`--data` is a .json or .jsonl file of rows with `instruction`, `output` and perhaps `input`, or the name of a dataset.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments, set_seed

import rosa
from rosa.data.rows import load_rows
from rosa.data.tokens import tokenize

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or Hub name of the base model")
parser.add_argument("--data", required=True, help="a .json or .jsonl file, or a dataset's name")
parser.add_argument("--output", required=True, help="folder for the adapter and the checkpoints")
args = parser.parse_args()

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = rosa.patch(AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"))

trainer = rosa.RosaTrainer(
    model,
    TrainingArguments(
        output_dir=args.output,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # below 1: a share of all steps
        logging_steps=10,
        report_to="none",
    ),
    dls={"k_ratio": 0.5, "interval": 40},  # the paper's, which are the defaults; dls=None trains every layer
    train_dataset=tokenize(load_rows(args.data), tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()  # the adapter alone
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()

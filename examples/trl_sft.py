"""Fine-tunes a model with RoSA by TRL's SFTTrainer, which takes layer selection as its optimizer.

python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B --data rows.json --output out
torchrun --nproc_per_node 2 examples/trl_sft.py ...

`--data` is a .json or .jsonl file of rows with `instruction`, `output` and perhaps `input`, or the name of a dataset.
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import rosa
from rosa.data.prompts import prompt
from rosa.data.rows import load_rows

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or Hub name of the base model")
parser.add_argument("--data", required=True, help="a .json or .jsonl file, or a dataset's name")
parser.add_argument("--output", required=True, help="folder for the adapter")
args = parser.parse_args()

set_seed(0)
rows = load_rows(args.data)
data = Dataset.from_list([{"prompt": prompt(r["instruction"], r["input"]), "completion": r["output"]} for r in rows])
model = rosa.patch(AutoModelForCausalLM.from_pretrained(args.model, dtype="auto"))
adamw = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-3)
selection = rosa.DynamicLayerSelection(adamw, model)

trainer = SFTTrainer(
    model,
    SFTConfig(
        output_dir=args.output,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # below 1: a share of all steps
        logging_steps=10,
        report_to="none",
        save_strategy="no",  # TRL's checkpoints would hold the whole model
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,  # TRL's default would keep backward from stopping at the lowest selected layer
    ),
    train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(args.model),
    optimizers=(selection, None),
)
trainer.train()
if trainer.is_world_process_zero():
    rosa.save_adapter(model, args.output)
    print(f"adapter saved in {args.output}, layers {selection.selected_layers} trained last")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()

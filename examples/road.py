"""Fine-tunes a model with RoAd, which turns and scales the outputs of its linear layers in pairs, by RosaTrainer; then
loads what it has learned into a fresh model.

python examples/road.py --model Qwen/Qwen2.5-0.5B --data rows.json --output out

`--data` is a .json or .jsonl file of rows with `instruction`, `output` and perhaps `input`, or the name of a dataset.
"""

import argparse

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
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
rosa.patch(model, rosa.RoadConfig(variant=2))  # on all linear layers; targets=("q_proj", "v_proj") for some
rosa.print_trainable_parameters(model)

trainer = rosa.RosaTrainer(  # every layer at every step; dls={} selects layers as RoSA does
    model,
    TrainingArguments(
        output_dir=args.output,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=3e-3,  # RoAd's paper's, as the schedule
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # below 1: a share of all steps
        logging_steps=10,
        report_to="none",
    ),
    train_dataset=tokenize(load_rows(args.data), tokenizer),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
)
trainer.train()
rosa.save_adapter(model, args.output)

fresh = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
rosa.load_adapter(fresh, args.output)
print(f"adapter saved in {args.output}, and loaded again: {rosa.active_adapter(fresh)}")

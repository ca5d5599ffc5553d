"""Fine-tunes a model with RoSA in a loop of one's own under Accelerate: on one device or on several, with DDP or
DeepSpeed's ZeRO-1 or -2, as `accelerate config` has set it up.

accelerate launch examples/accelerate_loop.py --model Qwen/Qwen2.5-0.5B --data rows.json --output out

`--data` is a .json or .jsonl file of rows with `instruction`, `output` and perhaps `input`, or the name of a dataset.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_cosine_schedule_with_warmup

import rosa
from rosa.data.rows import load_rows
from rosa.data.tokens import tokenize

EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 8, 1e-3  # the batch is of one device

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or Hub name of the base model")
parser.add_argument("--data", required=True, help="a .json or .jsonl file, or a dataset's name")
parser.add_argument("--output", required=True, help="folder for the adapter")
args = parser.parse_args()

set_seed(0)
accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
data = tokenize(load_rows(args.data), tokenizer)
loader = DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

model = rosa.patch(AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")).train()
# For ZeRO, whose unit is the param group; elsewhere rosa.trainable_parameters(model) would do.
adamw = torch.optim.AdamW(rosa.layer_groups(model), lr=LEARNING_RATE)
selection = rosa.DynamicLayerSelection(adamw, model)
steps = EPOCHS * len(loader)
scheduler = get_cosine_schedule_with_warmup(selection, num_warmup_steps=steps // 20, num_training_steps=steps)
model, optimizer, loader, scheduler = accelerator.prepare(model, selection, loader, scheduler)
trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]

step = 0
for _ in range(EPOCHS):
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            mean = accelerator.reduce(loss.detach(), reduction="mean").item()
            accelerator.print(f"step {step}: loss {mean:.4f}, layers {selection.selected_layers}")

if accelerator.is_main_process:  # every process, where FSDP2 or ZeRO-3 has shared the parameters out
    rosa.save_adapter(model, args.output)
    print(f"adapter saved in {args.output}")
accelerator.end_training()

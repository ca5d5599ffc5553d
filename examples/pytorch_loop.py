"""Fine-tunes a model with RoSA in a plain PyTorch loop, on one device.

python examples/pytorch_loop.py --model Qwen/Qwen2.5-0.5B --data rows.json --output out

`--data` is a .json or .jsonl file of rows with `instruction`, `output` and perhaps `input`, or the name of a dataset.
"""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_cosine_schedule_with_warmup

import rosa
from rosa.data.rows import load_rows
from rosa.data.tokens import tokenize

EPOCHS, BATCH_SIZE, LEARNING_RATE = 3, 8, 1e-3

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder or Hub name of the base model")
parser.add_argument("--data", required=True, help="a .json or .jsonl file, or a dataset's name")
parser.add_argument("--output", required=True, help="folder for the adapter")
args = parser.parse_args()

torch.manual_seed(0)
device = torch.accelerator.current_accelerator() or torch.device("cpu")
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
data = tokenize(load_rows(args.data), tokenizer)
loader = DataLoader(data, BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device).train()
rosa.patch(model)
rosa.print_trainable_parameters(model)

# Layer selection is a wrapper around any optimizer; the scheduler takes it for the optimizer that it wraps.
trained = rosa.trainable_parameters(model)
adamw = torch.optim.AdamW(trained, lr=LEARNING_RATE)
optimizer = rosa.DynamicLayerSelection(adamw, model)
steps = EPOCHS * len(loader)
scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)

step = 0
for _ in range(EPOCHS):
    for batch in loader:
        loss = model(**batch.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if step % 10 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f}, layers {optimizer.selected_layers}")

rosa.save_adapter(model, args.output)
print(f"adapter saved in {args.output}")

"""Answers a question by an adapter in a pipeline of transformers; the base is the one that the adapter names.

python examples/pipeline.py --adapter out --instruction "When are you open?"
"""

import argparse

from transformers import pipeline

import rosa
from rosa.adapters.folder import local_folder
from rosa.data.prompt_form import CHAT, INSTRUCTION, read_form
from rosa.data.prompts import prompt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--adapter", required=True, help="folder or Hub name of an adapter")
parser.add_argument("--instruction", required=True, help="a question, asked as in the adapter's training")
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()

form = read_form(local_folder(args.adapter))
asked = {CHAT: [{"role": "user", "content": args.instruction}], INSTRUCTION: prompt(args.instruction)}

model, tokenizer = rosa.load(args.adapter)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "return_full_text": False}
print(generator(asked.get(form, args.instruction), **options)[0]["generated_text"])

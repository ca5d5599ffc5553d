"""Answers a question by an adapter in a pipeline of transformers; the base is the one that the adapter names.

python examples/pipeline.py --adapter out --instruction "What is 17 + 25?"
"""

import argparse

from transformers import pipeline

import rosa
from rosa.data.prompts import prompt

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--adapter", required=True, help="folder or Hub name of an adapter")
parser.add_argument("--instruction", required=True, help="a question, in the prompt of its training")
parser.add_argument("--max-new-tokens", type=int, default=64)
args = parser.parse_args()

model, tokenizer = rosa.load(args.adapter)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "return_full_text": False}
print(generator(prompt(args.instruction), **options)[0]["generated_text"])

"""Chat templates for tiny tokenizers: with marks of what the assistant generates, without, and such as do not fit."""

_TURN = "'<|bos|>' + m['role'] + '\n' + m['content'] + '<|endoftext|>\n'"
_PROMPT = "{% if add_generation_prompt %}{{ '<|bos|>assistant\n' }}{% endif %}"

WITHOUT_MARKS = "{% for m in messages %}{{ " + _TURN + " }}{% endfor %}" + _PROMPT
WITH_MARKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|bos|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|endoftext|>\n' }}{% endgeneration %}"
    "{% else %}{{ " + _TURN + " }}{% endif %}{% endfor %}" + _PROMPT
)
# The last turn is written otherwise than those before it, as models that think have it.
THINKING = (
    "{% for m in messages %}{% if loop.last and m['role'] == 'assistant' %}"
    "{{ '<|bos|>assistant\n<think></think>' + m['content'] + '<|endoftext|>\n' }}"
    "{% else %}{{ " + _TURN + " }}{% endif %}{% endfor %}" + _PROMPT
)
WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    + WITHOUT_MARKS
)
MUTE = "{% for m in messages %}{{ '<|bos|>' + m['role'] + '\n<|endoftext|>\n' }}{% endfor %}" + _PROMPT
MARKS_OF_NOTHING = "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + WITHOUT_MARKS
WITHOUT_END = WITHOUT_MARKS.replace("<|endoftext|>", "")
END_NOT_LEARNT = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{{ '<|endoftext|>' }}{% endfor %}"
)

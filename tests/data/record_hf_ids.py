"""Records ``qwen2_hf_ids.json``: ids of Hugging Face's own Qwen2 tokenizer on the vocabulary of this folder.

Recorded with Transformers 5.23.0, outside the project's own environment:
``python tests/data/record_hf_ids.py``. Texts are in NFC, where Hugging Face and
llama.cpp agree.
"""

import json
from pathlib import Path

from gguf import GGUFReader
from transformers import Qwen2Tokenizer

HERE = Path(__file__).parent
FIRST_ADDED = 151643

TEXTS = [
    "x'tabc don'tdo 'Twas HE'SAID we'reed WE'VEnt I'mpossible you'LLama they'dx 'sS",
    "x'She x'the x'The x'rering x'RES x'vethe x'VETO x'MTHE x'ms x'llop x'LLOP x'DTHE x'dring",
    "a1b22c333 4,444.55 1e-9 ٣٤٥ ½ Ⅻ ²³",
    "tabs\t\tand  spaces   at    the     end     ",
    "line\nline\r\nline\r\n\r\n\n  indented\n\n\n\t\tdeep\n \n  \n",
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n",
    '<html><body class="x">&amp;</body></html> {{jinja}} {% if %} </think> <tool_call>',
    "naïve café Ångström Straße İstanbul ﬁ ǆ Ω",
    "Привет, мир! 你好，世界。こんにちは 세계 مرحبا שלום สวัสดี नमस्ते",
    "🦙🚀👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u200d\ufeff\u00a0\u2028\u3000x",
    "!?!?...---===+++###$$$%%%^^^&&&***((()))[[[]]]{{{}}}|||\\\\\\///~~~```'''\"\"\"",
    "CamelCaseWords snake_case_words kebab-case-words SCREAMING_CASE __dunder__ $var @decorator #tag",
    "https://example.org/a/b?c=d&e=f#g user@example.org C:\\path\\file.txt ../x/./y",
    "\x00\x01\x1b[31m\x7f\x85",
    " leading\n and trailing \n",
    "ſ'ſtop K'K",
]


def main() -> None:
    """Encodes every text."""
    fields = GGUFReader(HERE / "ggml-vocab-qwen2.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()[:FIRST_ADDED]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS}
    (HERE / "qwen2_hf_ids.json").write_text(json.dumps(ids) + "\n")


if __name__ == "__main__":
    main()

"""Prompt lookup against plain decoding, in turns: an editing task, and prose.

    python -m scripts.bench_lookup [--model FILE] [--context 12288] [--repeats 3]

The editing task is a file of 400 lines (this project's own; fewer where the context does not hold it twice)
that is to be written again with one function changed; prose is the project's README. No small model, and no
random one, would write these texts. So what is right of each draft is counted on the true text, by the real
drafter and its gate, and the time is measured on a text of as many tokens that the model does write: where
the drafter is right about the true text for n tokens, the model is given n right tokens of its own and then
a wrong one. Steps, rows, cache, gate and times are those of the user's path, and both ways must write the
same tokens, also when sampled. The last line is one JSON object.
"""

import argparse
import ast
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from qwen3_moe_jax import loader
from qwen3_moe_jax.api import Model, load
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.core.lookup import PromptLookup
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.machine.kernels import AUTO, CHOICES
from scripts import ROOT, leave

BEGAN = time.perf_counter()
LINES = 400
EDITED = ROOT / "qwen3_moe_jax" / "text" / "chat_template.py"
PROSE = ROOT / "README.md"
PROSE_PROMPT = 0.25
"""Part of the prose that is the prompt."""
NEW_LINES = (
    "if not isinstance(value, str | None):",
    "    raise TypeError(f'a text is needed, not {type(value).__name__}: give one, or None')",
    "if value is not None and len(value) > 1 << 20:",
    "    raise ValueError(f'{len(value)} characters are more than a megabyte: cut the text')",
)
SAMPLED = (
    Sampling(temperature=0.7, top_k=20, top_p=0.8, seed=11),
    Sampling(temperature=1.0, top_k=0, repetition_penalty=1.1, presence_penalty=0.5, seed=12),
)


class Mirror(PromptLookup):
    """The drafter at work on the true text, while the model writes another one of as many tokens."""

    def __init__(self, true_prompt: Sequence[int], true_text: Sequence[int], written: Sequence[int]):
        super().__init__()
        self._prompt, self._true, self._text = true_prompt, list(true_text), list(written)
        self._at = 0
        self.plain_steps, self.plain_seconds = 0, 0.0
        self.draft_seconds: dict[int, list[float]] = {}

    def begin(self, tokens: Sequence[int]) -> None:
        super().begin(self._prompt)

    def draft(self, maximum: int) -> list[int]:
        draft = super().draft(maximum)
        true = self._true[self._at : self._at + len(draft)]
        right = next((i for i, (a, b) in enumerate(zip(draft, true, strict=False)) if a != b), len(true))
        mine = self._text[self._at : self._at + len(draft)]
        return [token if i < right else token ^ 1 for i, token in enumerate(mine)]

    def wrote(self, tokens: Sequence[int], seconds: float) -> None:
        if seconds:
            self.plain_steps += len(tokens)
            self.plain_seconds += seconds
        super().wrote(self._next(tokens), seconds)

    def tried(self, draft: Sequence[int], tokens: Sequence[int], seconds: float) -> None:
        true_draft = self._true[self._at : self._at + len(draft)]
        wrong = [a != b for a, b in zip(draft, self._text[self._at :], strict=False)]
        true_draft = [t ^ 1 if w else t for t, w in zip(true_draft, wrong, strict=True)]
        self.draft_seconds.setdefault(len(draft), []).append(seconds)
        super().tried(true_draft, self._next(tokens), seconds)

    def _next(self, tokens: Sequence[int]) -> list[int]:
        """The true text's tokens in place of the model's."""
        found = self._true[self._at : self._at + len(tokens)]
        self._at += len(tokens)
        return found


def note(text: str) -> None:
    """How far it is."""
    print(f"{time.perf_counter() - BEGAN:.1f} s: {text}", file=sys.stderr, flush=True)


def changed(text: str) -> str:
    """The text of a Python file with one function changed: that in its middle gets four lines."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    middle = text.count("\n") / 2
    function = min(functions, key=lambda node: abs(node.lineno - middle))
    lines = text.splitlines()
    first = function.body[0]
    after = first.end_lineno if isinstance(first, ast.Expr) and len(function.body) > 1 else first.lineno - 1
    indent = " " * first.col_offset
    return "\n".join([*lines[:after], *(indent + line for line in NEW_LINES), *lines[after:]]) + "\n"


def whole_functions(text: str, lines: int) -> str:
    """The first lines of a Python file, fewer where a statement or a method would be cut."""
    module = ast.parse(text)
    bodies = [module.body, *(node.body for node in module.body if isinstance(node, ast.ClassDef))]
    ends = [statement.end_lineno or 0 for body in bodies for statement in body]
    return "\n".join(text.splitlines()[: max(end for end in ends if end <= lines)]) + "\n"


def edit(model: Model, lines: int) -> tuple[list[int], list[int], int]:
    """Prompt and answer of an editing task, and how many lines its file has."""
    text = whole_functions(EDITED.read_text(), lines)
    asked = f"Check the argument of the function in the middle of this file:\n\n```python\n{text}```\n\n"
    prompt, answer = map(model.tokenizer.encode, (asked, f"```python\n{changed(text)}```\n"))
    return prompt, answer, text.count("\n")


def editing(model: Model) -> tuple[list[int], list[int], int]:
    """The editing task, of as many lines as the context holds twice."""
    tasks = (edit(model, lines) for lines in range(LINES, 0, -10))
    return next(task for task in tasks if len(task[0]) + len(task[1]) < model.runner.max_context)


def counted(model: Model) -> dict[str, int]:
    """The whole file's drafts, without the model: no step is timed, so costs are those first expected."""
    prompt, true, lines = edit(model, LINES)
    lookup, at, plain = PromptLookup(), 0, 0
    lookup.begin(prompt)
    while at < len(true):
        if draft := lookup.draft(len(true) - at - 1):
            right = next((i for i, token in enumerate(draft) if token != true[at + i]), len(draft))
            lookup.tried(draft, true[at : at + right + 1], 0.0)
            at += right + 1
        else:
            lookup.wrote(true[at : at + 1], 1.0)
            at, plain = at + 1, plain + 1
    return {"lines": lines, "new_tokens": len(true), "plain_steps": plain, **vars(lookup.drafts)}


def prose(model: Model) -> tuple[list[int], list[int], int]:
    """Prompt and text of the prose, as much as the context holds, and the text's lines."""
    ids = model.tokenizer.encode(PROSE.read_text())[: model.runner.max_context - 1]
    first = int(len(ids) * PROSE_PROMPT)
    return ids[:first], ids[first:], PROSE.read_text().count("\n")


def rate(model: Model, prompt: list[int], count: int, sampling: Sampling, lookup: PromptLookup | None):
    """Tokens that were written, and how many per second after the first."""
    began, tokens = 0.0, []
    for token in model.runner.stream(prompt, max_tokens=count, sampling=sampling, lookup=lookup):
        began = began or time.perf_counter()
        tokens.append(token)
    return tokens, (len(tokens) - 1) / (time.perf_counter() - began)


def compare(model: Model, prompt: list[int], true: list[int], repeats: int) -> dict[str, object]:
    """Both ways in turns, after one run of each that compiles."""
    greedy, count = Sampling(temperature=0), len(true)
    text, _ = rate(model, prompt, count, greedy, None)
    note(f"{count} tokens written")
    same = rate(model, prompt, count, greedy, Mirror(prompt, true, text))[0] == text
    note(f"the same with drafts: {same}")
    plain, ours, lookup = [], [], None
    for number in range(2 * repeats):
        if number % 4 in (0, 3):  # none is always first
            plain.append(rate(model, prompt, count, greedy, None)[1])
            continue
        lookup = Mirror(prompt, true, text)
        tokens, speed = rate(model, prompt, count, greedy, lookup)
        ours.append(speed)
        same &= tokens == text
    assert lookup is not None
    step = lookup.plain_seconds / max(lookup.plain_steps, 1)
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": count,
        "plain_tokens_per_s": statistics.median(plain),
        "lookup_tokens_per_s": statistics.median(ours),
        "ratio": statistics.median(b / a for a, b in zip(plain, ours, strict=True)),
        "ratios": [b / a for a, b in zip(plain, ours, strict=True)],
        "same_tokens": same,
        "drafts": vars(lookup.drafts),
        "plain_steps": lookup.plain_steps,
        "plain_step_ms": 1e3 * step,
        "draft_step_ms": {n: 1e3 * statistics.median(s) for n, s in sorted(lookup.draft_seconds.items())},
    }


def sampled_are_same(model: Model, prompt: list[int], true: list[int], count: int) -> list[dict[str, object]]:
    """Whether sampled texts are the same with drafts, and how many of these were right."""
    found = []
    for sampling in SAMPLED:
        text, _ = rate(model, prompt, count, sampling, None)
        lookup = Mirror(prompt, true, text)
        tokens, _ = rate(model, prompt, count, sampling, lookup)
        found.append({"same_tokens": tokens == text, **vars(lookup.drafts)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("--context", type=int, default=12288, help="tokens of the KV cache")
    parser.add_argument("--kernels", choices=CHOICES, default=AUTO)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, help="at most so many of each text")
    parser.add_argument("--sampled-tokens", type=int, default=128)
    parser.add_argument("--receipt", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    with open_model(loader.model_path(args.model)) as source:
        context = min(args.context, source.config.max_position_embeddings)
    options = {"max_context": context, "gate": False, "first_prompt": context // 2, "kernels": args.kernels}
    with load(args.model, backend="jax", prompt_lookup=True, **options) as model:
        note("loaded")
        facts = model.runner.describe()
        result: dict[str, object] = {
            "what": "prompt lookup beside plain decoding: drafts counted on the true text, times measured",
            "command": f"python -m scripts.bench_lookup {' '.join(sys.argv[1:])}".strip(),
            "model": model.source.path.name,
            "device": facts["device"],
            "kernels": facts["kernels"],
            "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
            "code": code_version(),
            "date": date.today().isoformat(),
        }
        result["counted"] = counted(model)
        for name, task in (("editing", editing), ("prose", prose)):
            prompt, true, lines = task(model)
            true = true[: args.new_tokens]
            result[name] = {"lines": lines, **compare(model, prompt, true, args.repeats)}
            note(f"{name} {json.dumps(result[name])}")
            if name == "editing":
                result["sampled"] = sampled_are_same(model, prompt, true, args.sampled_tokens)
                note(f"sampled {json.dumps(result['sampled'])}")
    leave(result, args.receipt)


if __name__ == "__main__":
    main()

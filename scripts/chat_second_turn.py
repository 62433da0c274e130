"""How soon a second turn starts: the first text of a first turn at a long context, and of the one after it.

    python -m scripts.chat_second_turn [--model FILE] [--tokens 2000] [--rounds 3] [--receipt FILE]

What chat does (``commands.talk``) without a terminal: a conversation whose first message has about so many
tokens, then a short message with ``reuse``. Programs are compiled before. The share is of medians; the last
line is JSON. The bar: a second turn at 2,000 tokens starts in at most 15 % of the first one's time.
"""

import argparse
import statistics
import sys
import time
from datetime import date
from pathlib import Path

from qwen3_moe_jax.api import Model, load
from qwen3_moe_jax.commands.bench import machine_facts
from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.parity.recorded import parity_text
from scripts import leave

BAR = 0.15
NEW_TOKENS = 8


def message(model: Model, tokens: int, number: int) -> str:
    """A text of about so many tokens that begins with its number, so that no two share their beginning."""
    ids = model.tokenizer.encode(parity_text())
    ids = (ids * (tokens // len(ids) + 1))[:tokens]
    return f"Round {number}.\n" + model.tokenizer.decode(ids)


def first_text(model: Model, messages: list[dict[str, str]]) -> tuple[float, str, int]:
    """Seconds until the first token of an answer, the answer, and the prompt's tokens that were reused."""
    began = time.perf_counter()
    stream = model.open_stream(messages, max_tokens=NEW_TOKENS, temperature=0, reuse=True)
    pieces, seconds = [], None
    for piece in stream:
        seconds = seconds or time.perf_counter() - began
        pieces.append(piece)
    return seconds or time.perf_counter() - began, "".join(pieces), model.runner.reused_tokens


def round_of(model: Model, tokens: int, number: int) -> tuple[float, float, int, int]:
    """Two turns: seconds of both, the context's tokens, and how many of them the second one reused."""
    messages = [{"role": "user", "content": message(model, tokens, number)}]
    one, answer, _ = first_text(model, messages)
    messages += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "and another one, please"},
    ]
    two, _, reused = first_text(model, messages)
    return one, two, len(model.prompt(messages)[0]), reused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a .gguf file (default: the embedded model)")
    parser.add_argument("--tokens", type=int, default=2000, help="of the first message")
    parser.add_argument("--rounds", type=int, default=3, help="counted; one before them compiles")
    parser.add_argument("--receipt", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    with load(args.model, backend="jax", max_context=args.tokens + 512, gate=False) as model:
        rows = [round_of(model, args.tokens, number) for number in range(args.rounds + 1)][1:]
        facts = machine_facts(model.runner.describe())
        name = str(model.source.metadata.get("general.name", model.source.path.name))
    first, second = (statistics.median(row[i] for row in rows) for i in (0, 1))
    result = {
        "what": "chat: seconds to the first text of a first turn and of the next one",
        "model": name,
        "machine": facts,
        "code": code_version(),
        "date": date.today().isoformat(),
        "command": f"python -m scripts.chat_second_turn --tokens {args.tokens} --rounds {args.rounds}",
        "context_tokens": rows[-1][2],
        "reused_tokens": rows[-1][3],
        "first_turn_s": [round(row[0], 4) for row in rows],
        "second_turn_s": [round(row[1], 4) for row in rows],
        "share": round(second / first, 4),
        "bar": BAR,
        "verdict": "pass" if second / first <= BAR else "fail",
    }
    leave(result, args.receipt)
    return result["verdict"] != "pass"


if __name__ == "__main__":
    sys.exit(main())

"""How fast ``qwen3-moe batch`` is beside its engine alone, and what the order of the work gives: one run.

    python -m scripts.bench_batch_file [--model FILE] [--requests 96] [--slots 16] [--receipt FILE]

The work is uneven: prompts of 16 to 192 tokens, answers of 8 to 160, in no order.
The engine alone (``JaxRunner.generate_batch``) takes it in the file's order and in the command's, in a
process of its own; then the command answers the file. One run of each before those that count compiles. The
command's own rate begins when its programs are loaded, as the engine's does; ``whole_process`` is that of
all seconds of the process, imports and loads among them. The best of the rounds counts. The last line is
JSON: ``ratio`` is the command's rate beside the engine's in the same order, ``sorting`` the engine's in both
orders.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.machine.child_environment import child_environment
from scripts import ROOT, leave

BAR = 0.9
PROMPT, ANSWER = (16, 192), (8, 160)


def requests(count: int) -> list[dict[str, Any]]:
    """Lines of the file: random prompts, long and short work mixed."""
    rng = random.Random(5)
    bodies = [
        {
            "prompt": [rng.randrange(256, 4000) for _ in range(rng.randint(*PROMPT))],
            "max_tokens": rng.randint(*ANSWER),
            "temperature": 0,
        }
        for _ in range(count)
    ]
    return [
        {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
        for number, body in enumerate(bodies)
    ]


def alone(args: argparse.Namespace) -> dict[str, float]:
    """New tokens per second of the engine, by the order of the work."""
    from qwen3_moe_jax.api import load
    from qwen3_moe_jax.core.sampling import Sampling
    from qwen3_moe_jax.serve.batch.lines import read
    from qwen3_moe_jax.serve.batch.order import ordered

    with args.file.open("rb") as file:
        lines = list(read(file))
    orders = {"of_the_file": lines, "of_the_command": ordered(lines)}
    rates = dict.fromkeys(orders, 0.0)
    with load(args.model, backend="jax", gate=False, max_context=args.context) as model:
        for number in range(args.rounds + 1):
            for name, order in orders.items():
                bodies = [json.loads(line.body) for line in order]
                began = time.perf_counter()
                found = model.runner.generate_batch(
                    [body["prompt"] for body in bodies],
                    max_tokens=[body["max_tokens"] for body in bodies],
                    sampling=Sampling(),
                    stop_ids=model.tokenizer.stop_ids,
                    slots=args.slots,
                )
                rate = sum(len(one.tokens) for one in found) / (time.perf_counter() - began)
                rates[name] = max(rates[name], rate if number else 0.0)
    return rates


def command(args: argparse.Namespace) -> tuple[int, float, float]:
    """New tokens and tokens per second, as the command says them, and the seconds of the process."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "qwen3_moe_jax.cli", "batch", args.file]
        words += ["-o", f"{folder}/results.jsonl"]
        words += ["--backend", "jax", "--no-gate", "--slots", args.slots, "--context", args.context]
        words += ["-m", args.model] if args.model else []
        done = subprocess.run(
            [str(word) for word in words], cwd=ROOT, env=child_environment(), capture_output=True, text=True
        )
        results = (Path(folder) / "results.jsonl").read_text().splitlines()
    found = re.search(r"([\d,]+) new tokens in .*, ([\d,.]+) tokens/s", done.stderr)
    if done.returncode or found is None or len(results) != args.requests:
        raise SystemExit(f"the command ended with {done.returncode}: {done.stderr[-500:]}")
    seconds = time.perf_counter() - began
    return int(found[1].replace(",", "")), float(found[2].replace(",", "")), seconds


def in_child(args: argparse.Namespace) -> dict[str, float]:
    """``alone`` in a process whose memory is free afterwards."""
    words = [sys.executable, "-m", "scripts.bench_batch_file", "--alone", *map(str, sys.argv[1:])]
    words += ["--file", str(args.file)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, cwd=ROOT, env=child_environment())
    return json.loads(done.stdout.splitlines()[-1])


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run, ready for JSON."""
    engine = in_child(args)
    runs = [command(args) for _ in range(args.rounds + 1)][1:]
    tokens, rate, seconds = max(runs, key=lambda run: run[1])
    ratio = rate / engine["of_the_command"]
    return {
        "what": "qwen3-moe batch beside its engine alone, new tokens per second",
        "command": f"python -m scripts.bench_batch_file --requests {args.requests} --slots {args.slots}",
        "model": Path(args.model).name if args.model else "the embedded model",
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "code": code_version(),
        "date": date.today().isoformat(),
        "new_tokens": tokens,
        "engine": {name: round(value, 1) for name, value in engine.items()},
        "batch_command": rate,
        "whole_process": round(tokens / seconds, 1),
        "ratio": round(ratio, 3),
        "sorting": round(engine["of_the_command"] / engine["of_the_file"], 3),
        "bar": BAR,
        "verdict": "pass" if ratio >= BAR else "fail",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a .gguf file (default: the embedded model)")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2, help="counted; one before them compiles")
    parser.add_argument("--receipt", type=Path, help="write the result here as JSON")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.context = 512
    if args.alone:
        print(json.dumps(alone(args)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        args.file = Path(folder) / "requests.jsonl"
        args.file.write_text("".join(json.dumps(line) + "\n" for line in requests(args.requests)))
        found = measured(args)
    leave(found, args.receipt)
    return found["verdict"] != "pass"


if __name__ == "__main__":
    sys.exit(main())

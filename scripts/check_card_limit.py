"""A model on a GPU with less memory than this one has: what the plan says beforehand, and what happens.

    python -m scripts.check_card_limit FILE --gb 22.8 --kernels portable      # as a card of 24 GB allows
    python -m scripts.check_card_limit Q2_K.gguf --mix Q2_K --gb 15.2 --context 16384
    python -m scripts.check_card_limit FILE --gb 15.2 --plan                  # loads nothing

The limit is XLA's own: what its allocator may hold, at any time. A process loads the file as a user does,
with the load gate, reads a prompt, decodes, and then fills the whole context but for what it decodes there.
The file is written first where there is none. The last line is JSON: the plan, the allocator's limit and its
peak after each step, rates of a second run of each. A model that the plan refuses is not loaded: exit code 1.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.machine.jax_devices import PREALLOCATE_VARIABLE, SHARE_VARIABLE
from qwen3_moe_jax.machine.kernels import AUTO, KERNELS
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.nvidia import nvidia_gpus
from qwen3_moe_jax.testing.random_models import tokenizer_of, write_random_gguf
from scripts import ROOT

CACHE_ITEM = {"float16": 2, "bfloat16": 2, "int8": 1}
VOCABULARY = ROOT / "tests" / "data" / "ggml-vocab-qwen2.gguf"


def plan(path: Path, context: int, kv_cache: str, limit: int) -> dict[str, Any]:
    """What the model takes, and whether and up to which context it fits; reads the header alone."""
    with open_model(path) as source:
        found = MemoryPlan.of(source, context, CACHE_ITEM[kv_cache])
        figures = {"file": source.nbytes, "weights": found.weights, "cache": found.cache}
    figures |= {"working": found.working, "total": found.total}
    return figures | {"fits": found.total <= limit, "fitting_context": found.fitting_context(limit)}


def share_of_card(limit: int, memory: int | None) -> float:
    """The share of a card's memory that is ``limit``; 0.95 of a card that does not tell its memory."""
    return limit / memory if memory else 0.95


def child(args: argparse.Namespace) -> None:
    """Under the limit: says what the allocator may hold, holds and held at most."""
    import jax

    import qwen3_moe_jax as q3
    from qwen3_moe_jax.core.sampling import Sampling

    say = lambda **result: print(json.dumps(result), flush=True)
    began = time.perf_counter()
    options = {"kernels": args.kernels, "kv_cache": args.kv_cache, "max_context": args.context}
    with q3.load(args.file, backend="jax", first_prompt=args.prompt, **options) as model:
        stats: Callable[[], dict[str, int]] = lambda: jax.devices()[0].memory_stats() or {}
        held = lambda: {"peak": stats().get("peak_bytes_in_use"), "held": stats().get("bytes_in_use")}
        facts = model.runner.describe()
        say(at="loaded", seconds=round(time.perf_counter() - began, 1), **held(),
            limit=stats().get("bytes_limit"), device=facts["device"], kernels=facts["kernels"],
            decode=facts["decode"], jax=jax.__version__)  # fmt: skip
        filled = args.context - args.tokens - 1
        for prompt in dict.fromkeys(min(length, filled) for length in (args.prompt, filled)):
            for attempt in ("compiles", "again"):
                ids = [(7 * i + 11) % 1000 for i in range(prompt)]
                begun = time.perf_counter()
                tokens = model.runner.stream(ids, max_tokens=args.tokens, sampling=Sampling(temperature=0))
                next(tokens)
                first = time.perf_counter()
                count = sum(1 for _ in tokens)
                rate = count / (time.perf_counter() - first)
                say(at="decoded", prompt=prompt, attempt=attempt, first_token_s=round(first - begun, 3),
                    prompt_tokens_per_s=round(prompt / (first - begun)), tokens=count + 1,
                    tokens_per_s=round(rate, 1), **held())  # fmt: skip


def run(args: argparse.Namespace, limit: int) -> dict[str, Any]:
    """The child's lines, under the limit, with its exit code."""
    card = next(iter(nvidia_gpus()), None)
    share = share_of_card(limit, card.memory if card else None)
    environment = child_environment(**{SHARE_VARIABLE: f"{share:.6f}", PREALLOCATE_VARIABLE: "false"})
    command = [sys.executable, "-u", "-m", "scripts.check_card_limit", *args.given, "--child"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=args.seconds,
        check=False,
    )
    print(done.stdout, flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    peaks = [line["peak"] for line in lines if line.get("peak")]
    within = bool(peaks) and max(peaks) <= limit and lines[0]["limit"] <= limit
    return {"rc": done.returncode, "steps": lines, "peak": max(peaks, default=None), "within": within}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--gb", type=float, default=22.8, help="what the allocator may hold, in 10^9 bytes")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--kv-cache", choices=list(CACHE_ITEM), default="float16")
    parser.add_argument("--kernels", choices=(AUTO, *KERNELS), default=AUTO)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--mix", default="q4_k_m", help="of the file that is written where there is none")
    parser.add_argument("--seconds", type=float, default=240, help="after which the process is ended")
    parser.add_argument("--plan", action="store_true", help="say what it will take, and stop")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    if args.child:
        child(args)
        return 0
    if not args.file.exists():
        tokenizer = tokenizer_of(VOCABULARY)
        write_random_gguf(args.file, PRESETS["Qwen3-30B-A3B"], mix=args.mix, tokenizer=tokenizer)
    limit = int(args.gb * 1e9)
    result = {"file": args.file.name, "limit": limit, "context": args.context, "kv_cache": args.kv_cache}
    result["plan"] = plan(args.file, args.context, args.kv_cache, limit)
    print(json.dumps(result), flush=True)
    if args.plan or not result["plan"]["fits"]:
        return int(not result["plan"]["fits"])
    result |= run(args, limit)
    print(json.dumps(result))
    return result["rc"] or int(not result["within"])


if __name__ == "__main__":
    sys.exit(main())

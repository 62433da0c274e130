"""Speed of generation on this machine, with what ``qwen3-moe bench`` does not measure.

    python -m scripts.bench_generate [--model FILE] [--backend jax] [--prompt-tokens 512] [--new-tokens 256]

Two rows of ``qwen3-moe bench`` (a prompt, and writing after it, the median of --repeats runs after
one that compiles) beside llama.cpp's; the first token of a cold process, which is the time from its
start to its first token, with the compilation cache of an earlier one on disk (and without, for the
first run), and its tokens per second in the first second as a share of the row's; and with --parity
the distance from the reference. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from qwen3_moe_jax import loader
from qwen3_moe_jax.api import load
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.measure.benchmark import Benchmark, Workload
from qwen3_moe_jax.parity.metrics import cosine
from qwen3_moe_jax.reference import ReferenceRunner

TEXT = 'def quicksort(items):\n    """Sorts a list."""\n    if len(items) < 2:\n        return items\n'

LLAMA_CPP_TOKENS_PER_S = {"decode": 1290, "prefill": 5035}
"""llama.cpp (0c1e57098) on the embedded model, 4 cores of the machine the project was started on."""


def compare(model, token_ids: list[int]) -> dict[str, float | int]:
    """Logits of the prompt as prefill and token by token, against the reference, at the worst position."""
    reference = ReferenceRunner(model.source, max_context=model.runner.max_context)
    truth = reference.forward(token_ids)
    result: dict[str, float | int] = {"tokens": len(token_ids)}
    ways = {"prefill": {}, "decode": {"chunk_sizes": (1,)}} if model.runner.name == "jax" else {"prefill": {}}
    for way, options in ways.items():
        free = model.runner.forward(token_ids, **options)
        replayed = model.runner.forward(token_ids, expert_ids=truth.expert_ids, **options)
        result[f"{way}_cosine_free"] = float(cosine(free.logits, truth.logits).min())
        result[f"{way}_cosine_replayed"] = float(cosine(replayed.logits, truth.logits).min())
        result[f"{way}_nonfinite_logits"] = int((~np.isfinite(free.logits)).sum())
        same = np.sort(free.expert_ids, -1) == np.sort(truth.expert_ids, -1)
        result[f"{way}_same_experts"] = float(same.all(-1).mean())
    return result


FIRST_TEXT = """
import json, sys, time
from qwen3_moe_jax.api import load
from qwen3_moe_jax.core.sampling import Sampling

ids = json.loads(sys.argv[3])
model = load(sys.argv[1] or None, backend=sys.argv[2], first_prompt=len(ids))
count, began = -1, None
for token in model.runner.stream(ids, max_tokens=int(sys.argv[4]), sampling=Sampling(temperature=0)):
    began = began or time.perf_counter()
    count += 1
    if count == 0:
        print("first", flush=True)
    if (seconds := time.perf_counter() - began) >= 1:
        break
print(json.dumps(count / seconds))
"""
"""Writes tokens for a second; no token ends the text, for a model of random weights may begin with an end."""


def first_text(model: str | None, backend: str, ids: list[int], max_tokens: int, cache: str) -> tuple | None:
    """A new process: seconds from its start to its first token, and tokens per second in the second after.

    None where that process fails.
    """
    command = [sys.executable, "-u", "-c", FIRST_TEXT, model or "", backend, json.dumps(ids), str(max_tokens)]
    environment = child_environment() | {"XDG_CACHE_HOME": cache}
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    wrote = process.stdout.readline()
    seconds = time.perf_counter() - began
    rate = process.stdout.read()
    if process.wait() or not wrote:
        print("note: the process that times the first token failed", file=sys.stderr)
        return None
    return seconds, json.loads(rate)


def cold_starts(args: argparse.Namespace, prompt: list[int], bench_rate: float) -> dict[str, float | None]:
    """First tokens with an empty and with a filled cache; the rate from then on beside that of ``bench``."""
    with tempfile.TemporaryDirectory() as cache:
        runs = [
            first_text(args.model, args.backend, prompt, args.new_tokens, cache)
            for _ in range(1 + args.repeats)
        ]
    found: dict[str, float | None] = {"first_text_cold_cache_s": runs[0] and runs[0][0]}
    warm = None if None in runs[1:] else [statistics.median(column) for column in zip(*runs[1:], strict=True)]
    found["first_text_warm_cache_s"] = warm and warm[0]
    for name, rate in (("cold", runs[0] and runs[0][1]), ("warm", warm and warm[1])):
        found[f"first_second_{name}_cache_of_bench"] = rate and rate / bench_rate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("--backend", choices=loader.BACKENDS, default="jax")
    parser.add_argument("--dtype", choices=loader.DTYPES)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-cold-start", action="store_true", help="do not time new processes")
    parser.add_argument("--parity", type=int, metavar="N", help="compare N tokens with the reference, too")
    parser.add_argument("--context", type=int, help="tokens of the KV cache")
    args = parser.parse_args()

    began = time.perf_counter()
    options = {"backend": args.backend, "dtype": args.dtype, "max_context": args.context}
    with load(args.model, **options, gate=False) as model:
        load_seconds = time.perf_counter() - began
        ids = model.tokenizer.encode(TEXT)
        prompt = (ids * (args.prompt_tokens // len(ids) + 1))[: args.prompt_tokens]
        workloads = Workload("pp", args.prompt_tokens), Workload("tg", args.new_tokens, args.prompt_tokens)
        (prefill,), (decode,) = Benchmark(model.source, model.runner, repeats=args.repeats).rows(workloads)
        memory = model.runner.memory() if args.backend == "jax" else None
        parity = compare(model, prompt[: args.parity]) if args.parity else None
        facts = model.runner.describe()
        name = model.source.metadata.get("general.name", model.source.path.name)
    result = {
        "model": name,
        "load_s": load_seconds,
        "first_run_s": prefill.timing.first_run + decode.timing.first_run,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "prefill_tokens_per_s": prefill.median,
        "decode_tokens_per_s": decode.median,
        "rows": [prefill.as_dict(), decode.as_dict()],
        "parity": parity,
        "memory": memory,
        "backend": facts,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    if not args.no_cold_start:
        result |= cold_starts(args, prompt, decode.median)
    print(f"{name} on {facts['device']}, {facts['compute_dtype']}")
    for what in ("decode", "prefill"):
        rate = result[f"{what}_tokens_per_s"]
        peer = LLAMA_CPP_TOKENS_PER_S[what]
        beside = "" if args.model else f"  ({rate / peer:.0%} of llama.cpp's {peer})"
        print(f"{what:8} {rate:10.1f} tokens/s{beside}")
    if parity:
        print(*(f"{key} {value}" for key, value in parity.items()), sep="\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

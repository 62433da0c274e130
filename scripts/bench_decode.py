"""Decode of a GGUF file as a user gets it: tokens per second, device memory, seconds to the first token.

    python -m scripts.bench_decode FILE [--rows 1:0 1:4096 8:0 16:0] [--context 32768] [--stages cold rows]

Every stage is a process of its own (``JaxRunner`` on the file) with a time limit: one that hangs says where
(its Python stacks), is ended, and costs only itself. Stages, in the order of what they risk:

cold     a new process to its first token, the file in the page cache: first with an empty compile cache, then
         with that of the first. Seconds since the start of the process at each step.
rows     BATCH:DEPTH. ``generate`` from a state whose sequences are DEPTH tokens deep in a random cache: needs
         no prefill. Sequence 0 must write the same tokens in every batch of the same depth.
memory   the peak with a KV cache of --context tokens, against 1.06 x file + cache + 0.5 GB.
stream   ``JaxRunner.stream`` after prompts of 16 and --prompt tokens: prefill and decode together.

Results are printed as they come; the last line is one JSON object. Without FILE: the embedded model.
"""

import argparse
import faulthandler
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3_moe_jax.machine.kernels import AUTO, CHOICES
from scripts import ROOT
from scripts._children import programs_in, results_of, say

OTHER_PROMPTS = (100, 512, 2048)
"""cold: after the first two tokens, a prompt of each other size: how long until its first token."""

STAGES = ("cold", "rows", "memory", "stream")
GRACE_SECONDS = 10
"""Between the limit, at which a process prints its stacks and ends itself, and its end from outside."""


# In the child processes


def limit(seconds: float) -> None:
    """Ends this process with all its Python stacks unless it comes here again within ``seconds``."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def open_runner(args: argparse.Namespace, context: int):
    """The file's weights in a JaxRunner, and the open file."""
    from qwen3_moe_jax.convert.open_model import open_model
    from qwen3_moe_jax.loader import embedded_model, make_runner

    source = open_model(args.model or embedded_model())
    context = min(context, source.config.max_position_embeddings)
    return make_runner(source, "jax", max_context=context, kernels=args.kernels), source


def cold(args: argparse.Namespace) -> None:
    """Times are the parent's: it reads these lines."""
    limit(args.limit)
    from qwen3_moe_jax.api import load
    from qwen3_moe_jax.core.sampling import Sampling

    say(at="imported")
    with load(args.model, backend="jax", kernels=args.kernels, gate=args.gate, first_prompt=3) as model:
        say(at="loaded")
        tokens = model.runner.stream([1, 2, 3], max_tokens=2, sampling=Sampling(temperature=0))
        first = next(tokens)
        say(at="first token", token=first)
        say(at="second token", token=next(tokens))
        tokens.close()
        for length in OTHER_PROMPTS:
            prompt = [1 + i % 99 for i in range(length)]
            tokens = model.runner.stream(prompt, max_tokens=2, sampling=Sampling(temperature=0))
            began = time.perf_counter()
            next(tokens)
            say(at=f"first token of {length}", seconds=round(time.perf_counter() - began, 3))
            tokens.close()


def start_state(runner, batch: int, depth: int, steps: int):
    """Sequences with ``depth`` tokens of random keys and values, and one token more as the next input."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen3_moe_jax.jax_backend.generate import DecodeState
    from qwen3_moe_jax.jax_backend.kv_cache import KVCache, whole_tiles

    length = whole_tiles(depth + 1 + steps)
    cache = KVCache.create(runner.config, batch, length, runner.cache_dtype)
    if depth:
        # Every sequence has the same keys and values: sequence 0 is the same in any batch.
        one = (cache.k.shape[0], 1, *cache.k.shape[2:])
        fill = jax.jit(
            lambda a, seed: a + jax.random.normal(jax.random.key(seed), one, a.dtype), donate_argnums=0
        )
        cache = KVCache(fill(cache.k, 1), fill(cache.v, 2))
    tokens = np.zeros((batch, length), np.int32)
    tokens[:, depth] = (17 + 1000 * np.arange(batch)) % runner.config.vocab_size
    empty = DecodeState.empty(cache, length, runner.config.vocab_size)
    return replace(empty, tokens=jnp.asarray(tokens), limit=jnp.full((batch,), depth + 1 + steps, jnp.int32))


def measure_row(runner, batch: int, depth: int, steps: int, repeats: int) -> dict[str, object]:
    """Median of ``repeats`` dispatches of ``steps`` tokens from the same state, after one that compiles."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qwen3_moe_jax.jax_backend.generate import decode

    state = start_state(runner, batch, depth, steps)
    seconds, written = [], []
    for _ in range(repeats + 1):
        filled = jnp.full((batch,), depth, jnp.int32)
        again = replace(state, length=filled + 1, filled=filled, finished=jnp.zeros((batch,), bool))
        again = jax.block_until_ready(jax.device_put(again, runner.device))  # as later states are
        began = time.perf_counter()
        state, _ = jax.block_until_ready(
            decode(runner.decoder, runner.params, again, jnp.int32(steps), rows=batch)
        )
        seconds.append(time.perf_counter() - began)
        written.append(np.asarray(state.tokens[:, depth + 1 : depth + 1 + steps]))
    median = statistics.median(seconds[1:])
    return {
        "row": f"{batch}:{depth}",
        "tok_s": round(batch * steps / median, 1),
        "best_tok_s": round(batch * steps / min(seconds[1:]), 1),
        "ms_per_step": round(median / steps * 1e3, 4),
        "first_dispatch_s": round(seconds[0], 2),
        "finite": not bool(np.asarray(state.nonfinite).any()),
        "same_tokens_each_run": all((w == written[0]).all() for w in written),
        "first_tokens": written[0][0, :16].tolist(),
    }


def rows(args: argparse.Namespace) -> None:
    limit(args.limit)
    runner, source = open_runner(args, args.context)
    say(**describe(runner, source))
    for row in args.rows:
        limit(args.row_limit)
        say(at="row", begins=row)
        batch, depth = map(int, row.split(":"))
        say(**measure_row(runner, batch, depth, args.steps, args.repeats))


def describe(runner, source) -> dict[str, object]:
    import jax

    return {
        "at": "loaded",
        "backend": runner.describe(),
        "jax": jax.__version__,
        "config": {"layers": source.config.num_hidden_layers, "hidden": source.config.hidden_size},
        "identity": source.identity,
        "file_bytes": source.nbytes,
    }


def memory(args: argparse.Namespace) -> None:
    limit(args.limit)
    from qwen3_moe_jax.core.sampling import Sampling
    from qwen3_moe_jax.machine.memory import cache_nbytes

    runner, source = open_runner(args, args.context)
    loaded = runner.memory()
    say(at="loaded", peak=loaded and loaded["peak"])
    tokens = runner.stream([1, 2, 3], max_tokens=40, sampling=Sampling(temperature=0))
    count = sum(1 for _ in tokens)
    cache = cache_nbytes(source.config, runner.max_context, runner.cache_dtype.itemsize)
    maximum = 1.06 * source.nbytes + cache + 0.5e9
    peak = (runner.memory() or {}).get("peak")
    say(
        context=runner.max_context,
        new_tokens=count,
        cache_bytes=cache,
        peak_bytes=peak,
        max_bytes=int(maximum),
        planned_bytes=runner.plan.total,
        within=None if peak is None else peak <= maximum,
    )


def stream(args: argparse.Namespace) -> None:
    limit(args.limit)
    from qwen3_moe_jax.core.sampling import Sampling

    new_tokens = 8 * args.steps  # most of them after the blocks have grown
    runner, _ = open_runner(args, args.prompt + new_tokens + 1)
    for prompt in sorted({16, args.prompt}):
        prompt = min(prompt, runner.max_context - 1)
        for attempt in ("compiles", "warm"):
            limit(args.row_limit)
            ids = [(7 * i + 11) % runner.config.vocab_size for i in range(prompt)]
            began = time.perf_counter()
            tokens = runner.stream(ids, max_tokens=new_tokens, sampling=Sampling(temperature=0))
            next(tokens)
            first = time.perf_counter()
            say(at="first token", prompt=prompt, attempt=attempt, seconds=round(first - began, 3))
            count = sum(1 for _ in tokens)
            decode = time.perf_counter() - first
            say(
                prompt=prompt,
                attempt=attempt,
                first_token_s=round(first - began, 4),
                prefill_tok_s=round(prompt / (first - began), 1),
                decode_tok_s=round(count / decode, 1) if count else None,
            )


# In the parent


def lines_of(
    args: argparse.Namespace, stage: str, seconds: float, cache: str, **changes: object
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Runs one stage in a process, which may take long enough for all its parts: as ``results_of``."""
    options = {**vars(args), **changes, "limit": seconds}
    longest = seconds + len(options["rows"]) * args.row_limit * (stage == "rows") + GRACE_SECONDS
    longest += 4 * args.row_limit * (stage == "stream")
    return results_of("bench_decode", stage, options, cache, longest)


def run_cold(args: argparse.Namespace, cache: str) -> dict[str, object]:
    """Seconds to each step, with an empty compile cache and with a filled one."""
    out: dict[str, object] = {"gate": args.gate}
    for name in ("first", "warm"):
        steps = {}
        for at, result in lines_of(args, "cold", args.stage_limit, cache):
            took = result.get("seconds", at)  # of a later prompt by itself, else since the process began
            steps[str(result.get("at", "error"))] = took if "at" in result else result["error"]
        out[name] = steps
    return out


def run_rows(args: argparse.Namespace, cache: str) -> dict[str, object]:
    """All rows; after one that ends its process, a new process goes on with the next."""
    left, out, facts = list(args.rows), [], {}
    while left:
        running = None
        for _, result in lines_of(args, "rows", args.stage_limit, cache, rows=left):
            if "begins" in result:
                running = result["begins"]
            elif "row" in result:
                out.append(result)
                left.remove(result["row"])
            elif "error" in result:
                out.append({"row": running, **result})
                left = left[left.index(running) + 1 :] if running in left else []
            else:
                facts = {k: v for k, v in result.items() if k != "at"}
    alone = {
        r["row"].split(":")[1]: r["first_tokens"]
        for r in out
        if str(r["row"]).startswith("1:") and "tok_s" in r
    }
    for r in out:
        depth = str(r["row"]).rpartition(":")[2]
        if "tok_s" in r and depth in alone:
            r["same_tokens_as_batch_1"] = r["first_tokens"] == alone[depth]
    return {"rows": out, "model": facts}


def run_simple(args: argparse.Namespace, stage: str, cache: str) -> list[dict]:
    found = [result for _, result in lines_of(args, stage, args.stage_limit, cache)]
    return [r for r in found if "at" not in r]


def read_once(path: Path) -> float:
    """Puts the file into the page cache; seconds."""
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(16 << 20):
            pass
    return round(time.perf_counter() - began, 1)


def commit() -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a .gguf file")
    parser.add_argument("--kernels", choices=CHOICES, default=AUTO, help="forces a set of kernels")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rows", nargs="*", default=["1:0", "1:4096", "8:0", "16:0"], help="BATCH:DEPTH")
    parser.add_argument("--context", type=int, default=32768, help="tokens of the KV cache of memory")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the longer prompt of stream")
    parser.add_argument("--steps", type=int, default=32, help="tokens per dispatch; streams have 32 at most")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--gate", action="store_true", help="cold: with the check of a file's first load")
    parser.add_argument("--stage-limit", type=float, default=150, help="seconds")
    parser.add_argument("--row-limit", type=float, default=90, help="seconds of a row after loading")
    parser.add_argument("--cache", metavar="FOLDER", help="programs are kept there (default: nowhere)")
    parser.add_argument("--sha256", action="store_true", help="hash the whole file, at the end")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        faulthandler.enable()
        children = {"cold": cold, "rows": rows, "memory": memory, "stream": stream}
        children[sys.argv[2]](argparse.Namespace(**json.loads(sys.argv[3])))
        return
    args = parse()
    from qwen3_moe_jax.convert.open_model import open_model
    from qwen3_moe_jax.loader import embedded_model

    path = Path(args.model or embedded_model())
    result: dict[str, object] = {
        "file": path.name, "commit": commit(), "python": platform.python_version(),
        "read_s": read_once(path) if path.is_file() else None,
    }  # fmt: skip
    with programs_in(args.cache) as cache:
        for stage in args.stages:
            began = time.perf_counter()
            if stage == "cold":
                result[stage] = run_cold(args, cache)
            elif stage == "rows":
                result |= run_rows(args, cache)
            else:
                result[stage] = run_simple(args, stage, cache)
            print(f"[{stage}] took {time.perf_counter() - began:.1f} s", flush=True)
            print(json.dumps(result), flush=True)
    if args.sha256:
        with open_model(path) as source:
            result["sha256"] = source.sha256()
    print_table(result)
    print(json.dumps(result), flush=True)


def print_table(result: dict) -> None:
    for row in result.get("rows", []):
        print(f"{row['row']!s:>8}  {row.get('tok_s', row.get('error'))} tokens/s")


if __name__ == "__main__":
    main()

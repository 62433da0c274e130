"""The CPU's own kernels beside llama.cpp: the same file, threads and machine, one after the other.

    python -m scripts.bench_native [--model NAME=FILE ...] [--peer PYTHON] [--rounds 3] [--save]

Without --model the embedded model is measured; ``NAME=random:6`` writes a file of Qwen3-Coder-30B-A3B's
width with so many layers and random weights, and deletes it afterwards. PYTHON is one that imports
``cyllama``, whose wheels bring llama.cpp; without --peer nothing is compared. In each round both load the
file in a new process, read prompts of 64, 128 and 512 tokens, and write after an empty cache and after
512 tokens (512 of them, 64 of a file over 1 GB); ``generate`` writes as often as ``bench`` does. A ratio is
that of the best rounds, for a round beside other work says nothing. The last line is one JSON object, which
--save also writes as the receipt ``native_cpu``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from qwen3_moe_jax.loader import model_path
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.machine.threads import cores
from scripts import ROOT

RECEIPT = ROOT / "docs" / "receipts" / "native_cpu.json"

PROMPTS, DEPTHS = (64, 128, 512), (0, 512)
REPEATS, SECONDS = 3, 60  # of each row in a round: so many runs, or as many as begin in so long

TEXTS = ("def", "import", "class", "x =", "for", "return", "a", "1")
"""What to go on from: random weights may end a text with any token."""


def new_tokens(nbytes: int) -> int:
    """How many tokens are written: of a model in the caches a good part of a second, not its first 30 ms."""
    return 512 if nbytes < 1 << 30 else 64


HERE = """
import json, resource, sys, time
from qwen3_moe_jax.api import load
from qwen3_moe_jax.measure.benchmark import Benchmark, plan

path = sys.argv[1]
threads, prompts, depths, new_tokens, repeats, seconds = map(json.loads, sys.argv[2:])
began = time.perf_counter()
import qwen3_moe_jax.jax_backend.runner  # with JAX; the peer's imports are before its clock, too

import_s, began = time.perf_counter() - began, time.perf_counter()
with load(path, backend="jax", max_context=max(*prompts, *depths) + new_tokens + 2, gate=False) as model:
    found = {"import_s": import_s, "load_s": time.perf_counter() - began}
    benchmark = Benchmark(model.source, model.runner, repeats=repeats, max_seconds=seconds)
    rows = [row for some in benchmark.rows(plan(prompts, new_tokens, depths, [], 0)) for row in some]
    found |= {row.workload.name: row.best for row in rows}
    found["shares"] = {row.workload.name: row.share for row in rows if row.limited_by == "memory"}
    found["read_bytes_per_s"] = benchmark.limits.memory.rate
    facts = model.runner.describe()
    found["kernels"] = f"{facts['kernels']}: {facts['kernels_reason']}"
found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(found))
"""

PEER = """
import json, random, resource, sys, time
from cyllama.llama import llama_cpp as llama

path = sys.argv[1]
threads, prompts, depths, new_tokens, repeats, seconds = map(json.loads, sys.argv[2:])
llama.disable_logging()
llama.ggml_backend_load_all()
params = llama.LlamaModelParams()
params.n_gpu_layers = 0
began = time.perf_counter()
model = llama.LlamaModel(path, params)
found = {"load_s": time.perf_counter() - began}
found["version"] = f"ggml {llama.ggml_version()} {llama.ggml_commit()}"
params = llama.LlamaContextParams()
params.n_ctx, params.n_batch, params.n_ubatch = max(*prompts, *depths) + new_tokens + 2, 512, 512
params.n_threads = params.n_threads_batch = threads
params.flash_attn_type = 1
context = llama.LlamaContext(model, params)
batch = llama.LlamaBatch(n_tokens=512, embd=0, n_seq_max=1)
draw, place = random.Random(7), 0


def feed(count):
    global place
    for first in range(0, count, 512):
        batch.reset()
        now = min(512, count - first)
        for i in range(now):
            batch.add(draw.randrange(3, 4000), place + i, [0], i == now - 1)
        place += now
        context.decode(batch)
    context.synchronize()


def prompt(count):
    global place
    place = 0
    context.kv_cache_clear()
    began = time.perf_counter()
    feed(count)
    return time.perf_counter() - began


def write(depth):
    prompt(max(depth, 1))
    began = time.perf_counter()
    for _ in range(new_tokens):
        feed(1)
    return time.perf_counter() - began


for name, tokens, run, argument in (
    *((f"pp{n}", n, prompt, n) for n in prompts),
    *((f"tg{new_tokens}" + (f" @ d{n}" if n else ""), new_tokens, write, n) for n in depths),
):
    run(argument)
    began, times = time.perf_counter(), []
    while not times or (len(times) < repeats and time.perf_counter() - began < seconds):
        times.append(run(argument))
    found[name] = tokens / min(times)
found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(found))
"""
"""Needs no module of this project: it runs in the peer's Python."""


def measure(python: str, program: str, path: str, threads: int, tokens: int) -> dict[str, Any]:
    """Runs one of the programs in a new process.

    Raises:
      RuntimeError: it fails; with the end of what it wrote.
    """
    numbers = [json.dumps(value) for value in (threads, PROMPTS, DEPTHS, tokens, REPEATS, SECONDS)]
    command = [python, "-c", program, path, *numbers]
    environment = child_environment(JAX_PLATFORMS="cpu")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{python} failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def generated(path: str, text: str, tokens: int) -> dict[str, Any]:
    """What ``qwen3-moe generate`` shows for a text as long as the rows that write."""
    options = ["--model", path, "--backend", "jax", "--temperature", "0", "-n", str(tokens), "--json"]
    command = [sys.executable, "-m", "qwen3_moe_jax.cli", "generate", text, *options]
    done = subprocess.run(
        command, env=child_environment(JAX_PLATFORMS="cpu"), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def shown_rate(path: str, tokens: int) -> float:
    """Tokens/s that ``qwen3-moe generate`` shows for the first of ``TEXTS`` that does not end early.

    Raises:
      RuntimeError: all end early, so that no rate stands for a text of that length.
    """
    for text in TEXTS:
        found = generated(path, text, tokens)
        if found["new_tokens"] == tokens:
            return found["tokens_per_s"]
    raise RuntimeError(f"{path} ends every text before {tokens} tokens: generate shows no rate for it")


def rows(tokens: int) -> list[str]:
    """Names of the rows that both measure."""
    written = [f"tg{tokens}" + (f" @ d{depth}" if depth else "") for depth in DEPTHS]
    return [*(f"pp{count}" for count in PROMPTS), *written]


def best(rounds: Sequence[dict[str, Any]], row: str) -> float:
    """The highest rate of a row."""
    return max(found[row] for found in rounds)


def compared(path: str, peer: str | None, rounds: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """One file's figures: every round of both, and ratios of the best ones."""
    nbytes = os.path.getsize(path)
    tokens, here = new_tokens(nbytes), list[dict[str, Any]]()
    there: list[dict[str, Any]] = []
    for number in range(rounds):
        loads = [round(os.getloadavg()[0], 2)]
        here.append(measure(sys.executable, HERE, path, cores(), tokens))
        if peer:
            there.append(measure(peer, PEER, path, cores(), tokens))
        began, shown = time.perf_counter(), []
        while not shown or (len(shown) < REPEATS and time.perf_counter() - began < SECONDS):
            shown.append(shown_rate(path, tokens))
        here[-1]["generate"] = max(shown)
        for found in (here[-1], *there[-1:]):
            found["load_average"] = loads[0]
        line = [
            f"{row} {here[-1][row]:,.1f}" + (f" : {there[-1][row]:,.1f}" if peer else "")
            for row in rows(tokens)
        ]
        say(f"  round {number + 1}, load {loads[0]}: " + "; ".join(line))
    result: dict[str, Any] = {"bytes": nbytes, "here": here, "llama_cpp": there}
    result["generate_tokens_per_s"] = best(here, "generate")
    result["best"] = {row: best(here, row) for row in rows(tokens)}
    result["generate_of_bench"] = result["generate_tokens_per_s"] / best(here, f"tg{tokens}")
    if there:
        result["ratios"] = {row: best(here, row) / best(there, row) for row in rows(tokens)}
        result["load_ratio"] = min(x["load_s"] for x in here) / min(x["load_s"] for x in there)
    return result


@contextmanager
def model_file(what: str) -> Iterator[str]:
    """The path of a model: of a file, of the embedded one (""), or of one that is made for now."""
    if not what.startswith("random:"):
        yield str(model_path(what or None))
        return
    with tempfile.TemporaryDirectory(prefix="qwen3-moe-random-") as folder:
        path = str(Path(folder) / "random.gguf")
        options = ["--layers", what.removeprefix("random:"), "--vocab-size", "4096"]
        command = [sys.executable, "-m", "scripts.make_random_gguf", path, *options]
        subprocess.run(command, env=child_environment(), check=True, stdout=subprocess.DEVNULL)
        yield path


def commit() -> str:
    """The version of the code, or "" outside a clone."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    """The processor's name and the cores that are used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'a processor'}, {cores()} cores"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", metavar="NAME=FILE", help="may be given several times")
    parser.add_argument("--peer", metavar="PYTHON", help="one that imports cyllama")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help=f"write {RECEIPT.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {
        "what": "the CPU's own kernels beside llama.cpp, tokens/s; here : llama.cpp in each round",
        "date": str(date.today()),
        "command": "python -m scripts.bench_native",
        "code": commit(),
        "machine": processor(),
        "models": {},
    }
    for given in args.model or ["embedded="]:
        name, _, what = given.partition("=")
        began = time.perf_counter()
        with model_file(what) as path:
            print(f"{name}: {os.path.getsize(path) / 1e9:.2f} GB", flush=True)
            found = compared(path, args.peer, args.rounds, lambda line: print(line, flush=True))
        found["took_s"] = round(time.perf_counter() - began)
        result["models"][name] = found
        print(f"  generate shows {found['generate_of_bench']:.2f} of bench's rate")
        for row, share in found["here"][-1]["shares"].items():
            print(f"  {row}: {share:.0%} of a read of main memory")
        for row, ratio in found.get("ratios", {}).items():
            print(f"  {row}: {ratio:.2f} of llama.cpp")
    if args.save:
        RECEIPT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

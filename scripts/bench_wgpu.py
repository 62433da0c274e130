"""Speed and parity of the wgpu backend on one graphics adapter.

    python -m scripts.bench_wgpu                              # the embedded model
    python -m scripts.bench_wgpu --model FILE --parity        # a full-size file on a GPU
    python -m scripts.bench_wgpu --model FILE --kernels --sweep

Decode is the rate of the tokens after the first, prefill the prompt's tokens over the time to
the first token; the best of --repeats runs, after one that compiles. The share of bandwidth
is the bytes of weights and cache that a token reads, times tokens/s, over what a shader that
only reads gets from the memory, measured here. --parity runs the NumPy reference on
a prompt of three tokens and exits with 1 where the cosine of any position is below 0.99999 with
the same experts. --peer FILE takes what another program measured on the same card: JSON with its "name",
"prefill_tokens_per_s" and "decode_tokens_per_s"; ours over its stand in the result. On NVIDIA cards
the memory that the process holds stands beside the bytes of file and cache. --kernels times each
kernel of a decode step; --sweep tries other settings of the matrix kernels. The last line is one JSON
object.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.terminal import show_progress
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.wgpu_backend.runner import WgpuRunner
from scripts._wgpu_options import parser_of
from scripts._wgpu_rate import read_rate

GREEDY = Sampling()
PARITY_TOKENS = 3
PARITY_COSINE = 0.99999
PROMPT_SEED = 7
SWEEP_TOKENS = 48


def main() -> int:
    args = _arguments()
    used = _used_memory()
    began = time.perf_counter()
    with open_model(args.model) as source:
        with show_progress("upload") as progress:
            runner = WgpuRunner(source, max_context=args.context, adapter=args.adapter, progress=progress)
        result: dict[str, Any] = {
            "model": Path(args.model).name,
            "load_s": time.perf_counter() - began,
            **runner.describe(),
            "cpu_count": os.cpu_count(),
            "python": platform.python_version(),
        }
        print(f"{result['device']}: {result['memory']}, loaded in {result['load_s']:.1f} s", flush=True)
        prompt = np.random.default_rng(PROMPT_SEED).integers(0, source.config.vocab_size, args.prompt_tokens)
        result |= measure(runner, prompt, args.new_tokens, args.repeats)
        result |= memory(runner, source, used)
        result |= bandwidth(runner, source, result["decode_tokens_per_s"], args.prompt_tokens)
        if args.peer:
            result |= beside(result, json.loads(args.peer.read_text()))
        _show(result)
        if args.kernels:
            result["kernels_ms"] = kernel_times(runner, args.prompt_tokens)
        if args.sweep:
            result["sweep"] = sweep(runner, prompt)
        if args.parity:
            result |= parity(runner, source, prompt[:PARITY_TOKENS])
    print(json.dumps(result))
    return 1 if result.get("parity_passed") is False else 0


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parity", action="store_true", help="compare three tokens with the reference")
    parser.add_argument("--peer", type=Path, help="JSON of another program's measurement on this card")
    parser.add_argument("--kernels", action="store_true", help="time each kernel of a decode step")
    parser.add_argument("--sweep", action="store_true", help="try other settings of the matrix kernels")
    return parser.parse_args()


def run_once(runner: WgpuRunner, prompt: np.ndarray, new_tokens: int) -> tuple[float, float]:
    """(prefill, decode) tokens/s of one run."""
    began = time.perf_counter()
    tokens = runner.stream(prompt, max_tokens=new_tokens + 1, sampling=GREEDY)
    next(tokens)
    first = time.perf_counter()
    count = sum(1 for _ in tokens)
    return len(prompt) / (first - began), count / (time.perf_counter() - first)


def measure(runner: WgpuRunner, prompt: np.ndarray, new_tokens: int, repeats: int) -> dict[str, Any]:
    """The best of several runs."""
    began = time.perf_counter()
    run_once(runner, prompt, new_tokens)
    first_run = time.perf_counter() - began
    runs = [run_once(runner, prompt, new_tokens) for _ in range(repeats)]
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "first_run_s": first_run,
        "prefill_tokens_per_s": max(r[0] for r in runs),
        "decode_tokens_per_s": max(r[1] for r in runs),
    }


def bytes_per_token(source: ModelSource, position: int) -> int:
    """Weights and float32 cache that one decoded token reads."""
    config = source.config
    total = 0
    for path in source.paths():
        if path == "embed_tokens" and not config.tie_word_embeddings:
            continue
        nbytes = source.tensor_nbytes(path)
        share = config.num_experts_per_tok / config.num_experts if ".experts." in path else 1.0
        total += int(nbytes * share)
    cache = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return total + cache * position


def bandwidth(runner: WgpuRunner, source: ModelSource, rate: float, position: int) -> dict[str, Any]:
    """What decoding reads per second, beside what a shader that only reads gets."""
    best = read_rate(runner._device)
    read = bytes_per_token(source, position)
    return {
        "bytes_per_token": read,
        "decode_gb_per_s": read * rate / 1e9,
        "read_gb_per_s": best / 1e9,
        "share_of_bandwidth": read * rate / best,
    }


def _told(question: str) -> list[list[str]]:
    """What nvidia-smi answers, line by line; nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, question, "--format=csv,noheader,nounits"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20).stdout
    return [line.split(", ") for line in told.splitlines()]


def _used_memory() -> int | None:
    """Bytes of the one NVIDIA card that programs hold; None where there is none, or several."""
    told = _told("--query-gpu=memory.used")
    return int(told[0][0]) << 20 if len(told) == 1 and told[0][0].isdecimal() else None


def _own_memory() -> int | None:
    """Bytes of NVIDIA cards that this process holds; None where the driver does not tell."""
    told = _told("--query-compute-apps=pid,used_memory")
    own = [int(line[1]) << 20 for line in told if line[0] == str(os.getpid()) and line[1].isdecimal()]
    return sum(own) if own else None


def memory(runner: WgpuRunner, source: ModelSource, before: int | None) -> dict[str, Any]:
    """Bytes of NVIDIA cards that the process holds, driver and all, beside what file and cache take.

    ``gpu_bytes`` is what the driver says of this process; where it is silent, the rise of what the one card
    has in use.
    """
    own, after = _own_memory(), _used_memory()
    risen = after - before if before is not None and after is not None else None
    used = own if own is not None else risen
    if used is None:
        return {}
    needed = source.nbytes + runner.cache_nbytes
    found = {"gpu_bytes": used, "file_and_cache_bytes": needed, "gpu_bytes_over_needed": used / needed}
    return found if risen is None else {**found, "card_bytes": risen}


def beside(own: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Another program's rates, and ours over them."""
    rates = ("prefill_tokens_per_s", "decode_tokens_per_s")
    return {"peer": peer, **{f"{name}_of_peer": own[name] / peer[name] for name in rates}}


def kernel_times(runner: WgpuRunner, position: int, repeats: int = 5) -> dict[str, float]:
    """Milliseconds of each kernel in a decode step: all its dispatches in one submit, best of several."""
    program, device = runner._decode, runner._device
    groups = defaultdict(list)
    for site in [*program.body, *program.head, runner._sample[False]]:
        groups[f"{site.dispatch.kernel.name} x={site.x} y={site.y}"].append(site)
    found = {}
    for name, sites in groups.items():
        best = float("inf")
        for _ in range(repeats):
            runner._write_step(position)
            launches = program.launches(sites, position, 1)
            device.read(runner._buffers.step, np.uint32, 1)
            began = time.perf_counter()
            device.run(launches)
            device.read(runner._buffers.step, np.uint32, 1)
            best = min(best, time.perf_counter() - began)
        found[f"{name} ({len(sites)} times)"] = 1e3 * best
        print(f"{1e3 * best:9.3f} ms  {name} ({len(sites)} times)", flush=True)
    return found


def sweep(runner: WgpuRunner, prompt: np.ndarray) -> list[dict[str, Any]]:
    """Decode speed with other settings of the matrix kernels, best first."""
    own, subgroups = runner._device.tuning, runner._device.subgroups
    hardware = own.lanes > 1
    settings = product((64, 128) if hardware else (8, 16, 32), (32, 16, 8) if hardware else (1,), (1, 2, 4))
    found = []
    for workgroup, lanes, rows in settings:
        changed = {"workgroup": workgroup, "lanes": lanes, "decode_rows": rows}
        runner.retune(replace(own, **changed), subgroups=subgroups)
        run_once(runner, prompt[:16], 2)
        rate = max(run_once(runner, prompt[:16], SWEEP_TOKENS)[1] for _ in range(2))
        found.append({**changed, "decode_tokens_per_s": rate})
        print(f"{rate:9.1f} tokens/s  {changed}", flush=True)
    runner.retune(own, subgroups=subgroups)
    return sorted(found, key=lambda row: -row["decode_tokens_per_s"])


def parity(runner: WgpuRunner, source: ModelSource, tokens: np.ndarray) -> dict[str, Any]:
    """Three tokens through the NumPy reference and this backend, with its own and with the same experts."""
    began = time.perf_counter()
    truth = ReferenceRunner(source, max_context=len(tokens)).forward(tokens)
    seconds = time.perf_counter() - began
    free = runner.forward(tokens)
    replayed = runner.forward(tokens, expert_ids=truth.expert_ids)
    decoded = [
        next(iter(runner.stream(tokens[: i + 1], max_tokens=1, sampling=GREEDY))) for i in range(len(tokens))
    ]
    result = {
        "reference_s": seconds,
        "parity_cosine": _cosines(free.logits, truth.logits),
        "parity_cosine_same_experts": _cosines(replayed.logits, truth.logits),
        "parity_experts_equal": float(np.mean(free.expert_ids == truth.expert_ids)),
        "parity_greedy_equal": decoded == truth.logits.argmax(-1).tolist(),
    }
    result["parity_passed"] = min(result["parity_cosine_same_experts"]) >= PARITY_COSINE
    print(f"parity: {'passed' if result['parity_passed'] else 'FAILED'}: {result}", flush=True)
    return result


def _cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return ((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))).tolist()


def _show(result: dict[str, Any]) -> None:
    print(f"prefill {result['prefill_tokens_per_s']:9.1f} tokens/s ({result['prompt_tokens']} tokens)")
    print(
        f"decode  {result['decode_tokens_per_s']:9.1f} tokens/s: {result['decode_gb_per_s']:.1f} GB/s, "
        f"{result['share_of_bandwidth']:.1%} of the {result['read_gb_per_s']:.0f} GB/s that a shader reads",
        flush=True,
    )
    if "gpu_bytes" in result:
        print(
            f"memory {result['gpu_bytes'] / 1e9:9.2f} GB of the card, "
            f"{result['gpu_bytes_over_needed']:.3f} of what file and cache take"
        )
    if "peer" in result:
        print(
            f"of {result['peer']['name']}: prefill {result['prefill_tokens_per_s_of_peer']:.2f}, "
            f"decode {result['decode_tokens_per_s_of_peer']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of the wgpu backend goes: a load by step, a token and a prompt by kernel.

    python -m scripts.profile_wgpu                             # the embedded model, any adapter
    python -m scripts.profile_wgpu --model FILE --prompt-tokens 512

load    every step: calls, seconds of all threads together, when it first began and last ended, bytes
token   one decoded token after a prompt
prompt  the prompt itself

For each kernel of a token and of a prompt: its dispatches, microseconds, the bytes of weights and cache
that it reads, and their share of what a shader that only reads gets from this memory. A timestamp is
written after every dispatch, inside the pass. Where the adapter has none, the whole submit is timed alone.
Beside them what the host does for the same work without timestamps: encoding, submitting, waiting.

``--passes load token`` leaves others out. The last line is one JSON object.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.wgpu_backend import device as device_module
from qwen3_moe_jax.wgpu_backend.device import MAX_QUERIES, Device, Launch
from qwen3_moe_jax.wgpu_backend.program import Program
from qwen3_moe_jax.wgpu_backend.runner import WgpuRunner
from qwen3_moe_jax.wgpu_backend.sites import Site
from scripts._wgpu_options import parser_of
from scripts._wgpu_rate import read_rate
from scripts._wgpu_timeline import Timeline, load_steps

GREEDY = Sampling()
PROMPT_SEED = 7
RUNS = 5
HOST_TOKENS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    args = _arguments(arguments)
    timeline = Timeline()
    result: dict[str, Any] = {"model": Path(args.model).name}
    with load_steps(timeline):
        with timeline.step("open the file"):
            source = open_model(args.model)
        with source:
            with timeline.step("open the device"):
                device = Device(args.adapter, timestamps=True)
            with timeline.step("the whole load"):
                runner = WgpuRunner(source, max_context=args.context, device=device)
        result |= {"bytes": source.nbytes, **runner.describe()}
        vocabulary = source.config.vocab_size
        prompt = np.random.default_rng(PROMPT_SEED).integers(0, vocabulary, args.prompt_tokens)
        with timeline.step("first token of 16"):
            next(runner.stream(prompt[:16], max_tokens=1, sampling=GREEDY))
    if "load" in args.passes:
        seconds = timeline.steps["the whole load"].seconds
        result |= {"load_s": seconds, "steps": {n: s.to_json() for n, s in timeline.steps.items()}}
        print(f"load: {seconds:.2f} s, {source.nbytes / seconds / 1e9:.2f} GB/s on {result['device']}")
        print("\n".join(timeline.rows()), flush=True)
    if {"token", "prompt"} & set(args.passes):
        result["timestamps"] = device.timestamps
        result["read_gb_per_s"] = read_rate(device) / 1e9
        print(f"a shader that only reads gets {result['read_gb_per_s']:.0f} GB/s", flush=True)
        if not device.timestamps:
            print("this adapter writes no timestamps inside passes: kernels cannot be told apart")
    list(runner.stream(prompt, max_tokens=2, sampling=GREEDY))  # what the passes below find in the cache
    for name, profile in (("token", token), ("prompt", prompt_of)):
        if name in args.passes:
            result[name] = profile(runner, prompt, result["read_gb_per_s"])
    print(json.dumps(result))
    return 0


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    return parser.parse_args(arguments)


PASSES = ("load", "token", "prompt")


def token(runner: WgpuRunner, prompt: np.ndarray, rate: float) -> dict[str, Any]:
    """One token after the prompt; kernels, then the host's part of several tokens."""
    program, position = runner._decode, len(prompt)
    sites = [*program.body, *program.head, runner._sample[False]]
    runner._write_step(position)
    result = kernels(runner, program, sites, position, 1, rate)
    result["host"] = host(lambda: list(_stream(runner, prompt[:16], HOST_TOKENS)), HOST_TOKENS)
    _show("token", result)
    return result


def _stream(runner: WgpuRunner, prompt: np.ndarray, count: int) -> Generator[int]:
    return runner.stream(prompt, max_tokens=count, sampling=GREEDY)


def prompt_of(runner: WgpuRunner, prompt: np.ndarray, rate: float) -> dict[str, Any]:
    """The prompt's last chunk; kernels, then the host's part."""
    chunks = runner._chunks(len(prompt), len(prompt))
    program, (start, end) = runner._prefill_of(chunks[0][1]), chunks[-1]
    runner._device.write(runner._buffers["tokens"], prompt[start:end].astype(np.uint32))
    runner._write_step(start, end - start, end - start - 1)
    result = kernels(runner, program, program.body, start, end - start, rate)
    result |= {"tokens": end - start}
    result["host"] = host(lambda: next(_stream(runner, prompt, 1)), len(prompt))
    _show(f"prompt, {end - start} tokens", result)
    return result


def kernels(
    runner: WgpuRunner, program: Program, sites: Sequence[Site], position: int, tokens: int, rate: float
) -> dict[str, Any]:
    """Each kernel's dispatches, microseconds and bytes, the median of several runs of the whole pass."""
    device = runner._device
    pairs = [(site, program.shape.launch(site, position, tokens, 1)) for site in sites]
    found: list[tuple[Site, Launch]] = [(site, launch) for site, launch in pairs if launch is not None]
    launches = [launch for _, launch in found]
    walls, times = [], []
    for _ in range(RUNS):
        began = time.perf_counter()
        device.run(launches)
        device.read(runner._buffers.step, np.uint32, 1)
        walls.append(time.perf_counter() - began)
    result: dict[str, Any] = {"dispatches": len(launches), "wall_us": 1e6 * float(np.median(walls))}
    if not device.timestamps:
        return result | {"kernels": []}
    part = MAX_QUERIES - 1
    for _ in range(RUNS):
        taken = [device.run_timed(launches[i : i + part]) for i in range(0, len(launches), part)]
        times.append(np.concatenate(taken) / 1e3)
    micros = np.median(times, axis=0)
    reads = _bytes_read(runner, [site for site, _ in found], position, tokens)
    by_name: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for (site, launch), us, nbytes in zip(found, micros, reads, strict=True):
        by_name[_name(site, launch)].append((float(us), nbytes))
    rows = []
    for name, values in by_name.items():
        us, nbytes = sum(v[0] for v in values), sum(v[1] for v in values)
        share = nbytes / us / 1e3 / rate if us else 0.0
        rows.append({"kernel": name, "count": len(values), "us": us, "bytes": nbytes, "share": share})
    return result | {"us": float(micros.sum()), "bytes": sum(reads), "kernels": rows}


def _name(site: Site, launch: Launch) -> str:
    _, x, y, z = launch
    return f"{site.dispatch.kernel.name} {x}x{y}x{z}, {site.nbytes / 1e6:.2f} MB"


def _bytes_read(runner: WgpuRunner, sites: Sequence[Site], position: int, tokens: int) -> list[int]:
    """Bytes of weights and cache by site: an expert that several tokens chose counts once."""
    config = runner.config
    cache = 2 * (2 if runner._f16 else 4) * config.num_key_value_heads * config.head_dim
    every = range(config.num_hidden_layers)
    distinct = [len(np.unique(ids)) for ids in runner._expert_ids(every, tokens)]
    found, layer = [], -1
    for site in sites:
        name = site.dispatch.kernel.name
        if name == "router":
            layer += 1
        if name == "attention":
            found.append(cache * (position + tokens))
        elif name == "embed":
            found.append(site.nbytes * tokens)
        elif site.y in ("pairs", "pair tiles"):
            found.append(site.nbytes * distinct[layer])
        else:
            found.append(site.nbytes)
    return found


def host(work: Callable[[], object], tokens: int) -> dict[str, float]:
    """Microseconds of the host per token: encoding, finishing and submitting, waiting; and the wall's."""
    timeline = Timeline()
    with (
        timeline.wrap(Device, "run", "run"),
        timeline.wrap(device_module, "_encode", "encode"),
        timeline.wrap(device_module.Readback, "wait", "wait"),
    ):
        began = time.perf_counter()
        work()
        wall = time.perf_counter() - began
    seconds = {name: step.seconds for name, step in timeline.steps.items()}
    per = 1e6 / tokens
    encode = seconds.get("encode", 0.0)
    return {
        "wall_us": per * wall,
        "encode_us": per * encode,
        "finish_and_submit_us": per * (seconds.get("run", 0.0) - encode),
        "wait_us": per * seconds.get("wait", 0.0),
    }


def _show(title: str, result: dict[str, Any]) -> None:
    print(f"{title}: {result['dispatches']} dispatches, {result['wall_us']:.0f} us from submit to read-back")
    if result["kernels"]:
        print(f"{'kernel':<44}{'count':>6}{'us':>11}{'us each':>9}{'MB':>10}{'share':>8}")
        for row in sorted(result["kernels"], key=lambda row: -row["us"]):
            print(
                f"{row['kernel']:<44}{row['count']:>6}{row['us']:>11.1f}{row['us'] / row['count']:>9.1f}"
                f"{row['bytes'] / 1e6:>10.2f}{row['share']:>8.1%}"
            )
        print(
            f"{'all':<44}{result['dispatches']:>6}{result['us']:>11.1f}{'':>9}{result['bytes'] / 1e6:>10.2f}"
        )
    print("host, per token: " + ", ".join(f"{n} {v:.0f}" for n, v in result["host"].items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())

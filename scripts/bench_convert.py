"""How fast a model is packed, checked, converted and loaded, and in how much memory.

    python -m scripts.bench_convert model.gguf /tmp/checkpoint --receipt docs/receipts/convert_full_size.json

Converts MODEL to the folder OUT (which must not exist, and is kept), then reads
both from start to end, one tensor at a time, each in a process of its own whose
peak memory is reported. Bytes are those of the packed tensors; reading depends
on how much of the files the system has in memory. The last line is JSON.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import packed_nbytes
from qwen3_moe_jax.convert.source import READ_PIECE_BYTES, ModelSource, refuse_nonfinite
from qwen3_moe_jax.convert.unpack import block_arrays, empty_packed, pack, unpack_blocks
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.testing.random_models import random_blocks, tensor_nbytes
from scripts import leave

_PACK_BYTES = 256 << 20
_DISK_BYTES = 1 << 30
_ONE_CORE_BYTES = 2 << 30


def best_seconds(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def pack_rate(kind: GGMLType) -> float:
    """GB of file bytes packed per second, from memory to memory, on the threads that ``pack`` takes."""
    blocks = _PACK_BYTES // BLOCK_FORMATS[kind].nbytes
    raw = random_blocks(kind, blocks, np.random.default_rng(0)).reshape(-1)
    shape = (blocks, BLOCK_FORMATS[kind].weights)
    return raw.size / best_seconds(lambda: pack(raw, kind, shape), 3) / 1e9


def check_seconds(kind: GGMLType) -> tuple[float, float]:
    """Seconds for one byte on one core: reading from memory and unpacking it, and the scan for NaN."""
    blocks = READ_PIECE_BYTES // BLOCK_FORMATS[kind].nbytes
    raw = random_blocks(kind, blocks, np.random.default_rng(0)).reshape(-1)
    shape = (blocks, BLOCK_FORMATS[kind].weights)
    arrays = block_arrays(empty_packed(kind, shape))
    buffer = np.empty_like(raw)

    def load() -> None:
        buffer[...] = raw
        unpack_blocks(buffer, kind, arrays, 0)

    load_seconds = best_seconds(load, 200)
    scan_seconds = best_seconds(lambda: refuse_nonfinite("", kind, shape, arrays, 0, blocks), 200)
    return load_seconds / raw.size, scan_seconds / raw.size


def file_bytes_by_type(source: ModelSource) -> Counter[GGMLType]:
    counts: Counter[GGMLType] = Counter()
    for path, spec in source.specs.items():
        counts[source.types[path]] += tensor_nbytes(spec.shape, source.types[path])
    return counts


def disk_rate(folder: Path) -> float:
    """GB written and synced per second, by one plain file."""
    data = bytes(16 << 20)
    start = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_DISK_BYTES // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    return _DISK_BYTES / (time.perf_counter() - start) / 1e9


def read_model(path: str, threads: int, limit: int) -> dict:
    """Reads tensors one by one, up to ``limit`` bytes; rate and this process's peak memory."""
    done = 0
    with open_model(path, threads=threads) as source:
        start = time.perf_counter()
        for name in source.paths():
            done += source.tensor(name).nbytes
            if done >= limit:
                break
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "bytes": done,
        "seconds": round(seconds, 2),
        "gb_per_s": round(done / seconds / 1e9, 2),
        "peak_memory_gb": round(peak / 1e9, 3),
    }


def read_in_child(path: str, threads: int, limit: int = sys.maxsize) -> dict:
    """:func:`read_model` in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench_convert", path, path, "--read", str(threads), str(limit)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=child_environment())
    return json.loads(done.stdout.splitlines()[-1])


def convert_in_child(model: str, out: str) -> dict:
    """Runs ``qwen3-moe convert``; seconds, rate and its peak memory."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "qwen3_moe_jax", "convert", model, out]
    subprocess.run(command, check=True, env=child_environment())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    with open_model(model) as source:
        sizes = [packed_nbytes(source.types[path], spec.shape) for path, spec in source.specs.items()]
    return {
        "bytes": sum(sizes),
        "seconds": round(seconds, 2),
        "gb_per_s": round(sum(sizes) / seconds / 1e9, 3),
        "peak_memory_gb": round(peak / 1e9, 3),
        "largest_tensor_gb": round(max(sizes) / 1e9, 3),
    }


def in_memory(model: str) -> dict:
    """Packing and scanning from memory, each type weighted by its share of the model's bytes."""
    with open_model(model) as source:
        shares = file_bytes_by_type(source)
    rates = {kind: pack_rate(kind) for kind in shares}
    seconds = {kind: check_seconds(kind) for kind in shares}
    load = sum(count * seconds[kind][0] for kind, count in shares.items())
    scan = sum(count * seconds[kind][1] for kind, count in shares.items())
    return {
        "file_bytes": {kind.name: count for kind, count in shares.items()},
        "pack_gb_per_s": {kind.name: round(rate, 2) for kind, rate in rates.items()},
        "pack_model_gb_per_s": round(
            shares.total() / sum(count / rates[kind] for kind, count in shares.items()), 2
        ),
        "nan_scan_percent_of_load": round(100 * scan / (load + scan), 2),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="speed and memory of converting and loading")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--receipt", help="file to write the result to, as JSON")
    parser.add_argument("--read", nargs=2, type=int, metavar=("THREADS", "BYTES"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.read:
        print(json.dumps(read_model(args.model, *args.read)))
        return 0
    cores = os.cpu_count() or 1
    result = {
        "what": "python -m scripts.bench_convert",
        "machine": f"{cores} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_average_before": round(os.getloadavg()[0], 1),
        "disk_write_gb_per_s": round(disk_rate(Path(args.out).absolute().parent), 2),
        "convert": convert_in_child(args.model, args.out),
        "read_checkpoint_verified": read_in_child(args.out, cores),
        "read_gguf_checked": read_in_child(args.model, cores),
        "load_average_after": round(os.getloadavg()[0], 1),
    }
    # The first pass puts the bytes into the system's cache; then one core does nothing but copy and hash.
    passes = [read_in_child(args.out, 1, _ONE_CORE_BYTES) for _ in range(4)][1:]
    result["read_checkpoint_verified_one_thread_cached"] = max(passes, key=lambda run: run["gb_per_s"])
    # Last: what this process has taken by then would count as the peak of the processes that it starts.
    result["from_memory"] = in_memory(args.model)
    leave(result, args.receipt)
    return 0


if __name__ == "__main__":
    sys.exit(main())

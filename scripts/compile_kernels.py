"""Compiles the GPU kernels for every NVIDIA target, without a GPU, and fails where one has grown.

    python -m scripts.compile_kernels --install              # what CI runs
    python -m scripts.compile_kernels --targets 8.9 --sequences 1 2 4 8 --preset Qwen3-235B-A22B
    python -m scripts.compile_kernels --install --write      # new limits, after a change that is meant

``--install`` gets XLA's plugin and ptxas (270 MB, once, in the user's cache folder) with pip; without them it
says SKIPPED and ends with 0. Each target is a process of its own, two run at a time. What was compiled is
remembered by the kernels' sources, so that an unchanged tree takes seconds.

It prints registers, spilled bytes and shared memory of each kernel, and ends with an error where a kernel
spills more than 32 words, does not fit the card, could have two blocks on one multiprocessor, or takes
more of anything than ``docs/receipts/compiled_kernels.json`` says. The last line is JSON.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
import jax.numpy as jnp

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.shared_memory import shared_memory_budget
from qwen3_moe_jax.kernels_pallas.gpu import cards
from qwen3_moe_jax.machine.folders import writable_cache
from qwen3_moe_jax.testing.decode_kernel import trace_step
from scripts import ROOT, _absent_gpu, _prompt_kernels
from scripts._captured import captured_output
from scripts._receipts import write_rows

LIMITS = ROOT / "docs" / "receipts" / "compiled_kernels.json"
THREADS = 256
"""Of a block of the decode kernel."""
MAX_SPILLED = 128
"""Bytes per thread that a new limit may have: 32 words (``docs/reference/hardware.md``: what they cost)."""
AT_A_TIME = 2
SOURCES = (
    "kernels_pallas",
    "convert",
    "scripts/compile_kernels.py",
    "scripts/_prompt_kernels.py",
    "qwen3_moe_jax/testing/decode_kernel.py",
)
"""What a compiled kernel depends on."""
KEY = ("target", "kernel", "preset", "batch")
SIZES = ("registers", "spilled", "shared_memory")


def wanted(
    target: cards.Capability, presets: list[str], batches: list[int], *, prompts: bool = True
) -> Iterator[dict]:
    """The rows of one target, without their figures; with ``prompts`` those of ``_prompt_kernels`` too."""
    start = {"target": target.target, "card": _absent_gpu.first_card(target)[0]}
    for preset in presets:
        for kernels in ("hopper", "portable") if target.version == "9.0" else ("portable",):
            for batch in batches:
                own = start | {"preset": preset, "batch": batch}
                for cache in ("", " int8") if batch == 1 else ("",):
                    yield own | {"kernel": f"decode_step {kernels}{cache}"}
            for kernel, tile in _prompt_kernels.names(kernels) if prompts else ():
                yield start | {"kernel": kernel, "preset": preset, "batch": tile}


def compiled(target: cards.Capability, row: dict) -> dict:
    """The row with its figures, or with why there are none."""
    if not row["kernel"].startswith("decode_step"):
        return _prompt_kernels.compiled(target, row)
    cores = _absent_gpu.first_card(target)[1]
    _, kernels, *cache = row["kernel"].split()
    dtype = jnp.dtype(*cache or ["float16"])
    device = api.Device.of_cores(cores, kernels=kernels, shared_memory=target.shared_memory)
    config, batch = PRESETS[row["preset"]], row["batch"]
    largest = api.kernel_batch(config, device)
    if batch > largest:
        return row | {"skipped": f"takes kernels of {largest}"}
    shape = api.shape_config(config, batch, device, dtype)
    options = {"cache_dtype": dtype, "prefetches": shape.prefetches}
    sharding = _absent_gpu.sharding_of(target)
    with _absent_gpu.compiling_for(target), captured_output() as lines:
        traced = trace_step(config, batch=batch, device=device, sharding=sharding, **options)
        traced.lower(lowering_platforms=("cuda",)).compile()
    memory = sum(shared_memory_budget(shape).values())
    return row | {
        "blocks": shape.blocks,
        **_absent_gpu.ptxas_report("\n".join(lines)),
        "shared_memory": memory,
        "limit": target.shared_memory,
    }


def faults_of(row: dict) -> list[str]:
    """What is wrong with a compiled kernel by itself."""
    if "skipped" in row:
        return []
    if not row["registers"]:
        return ["ptxas reported nothing"]
    target = cards.capability_of(row["target"])
    registers = THREADS * -(-row["registers"] // 8) * 8
    per_core = min(
        target.registers_per_core // registers,
        target.shared_memory_per_core // (row["shared_memory"] + 1024),
    )
    found = []
    if row["spilled"] > MAX_SPILLED:
        found.append(f"spills {row['spilled']} bytes")
    if row["shared_memory"] > row["limit"]:
        found.append(f"takes {row['shared_memory']} of {row['limit']} bytes of shared memory")
    if per_core > 1 and row["kernel"].startswith("decode_step"):
        found.append(f"{per_core} blocks fit a multiprocessor")
    return found


def grown(rows: list[dict], limits: list[dict]) -> list[str]:
    """What takes more than the limits say, or has none."""
    before = {key_of(row): row for row in limits}
    found = []
    for row in rows:
        old = before.get(key_of(row))
        if old is None:
            found.append(f"{name_of(row)}: no limit (--write makes one)")
        elif "skipped" not in row and "skipped" not in old:
            grew = [n for n in SIZES if row[n] > old[n]]
            found += [f"{name_of(row)}: {n} {row[n]}, before {old[n]}" for n in grew]
        elif "skipped" in row and "skipped" not in old:
            found.append(f"{name_of(row)}: {row['skipped']}, before it fitted")
    return found


def key_of(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def name_of(row: dict) -> str:
    return f"{row['target']} {row['kernel']} batch {row['batch']} of {row['preset']}"


# What was compiled before


def sources_hash() -> str:
    """Changes with every source that a compiled kernel depends on, JAX and ptxas."""
    digest = hashlib.sha256(f"{jax.__version__} {_absent_gpu.ptxas_version()}".encode())
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".toml"):
                digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def remembered(target: cards.Capability, row: dict, version: str) -> dict:
    """The compiled row: as it was found for these sources before, or compiled now."""
    folder = writable_cache("compiled")
    name = hashlib.sha256(repr(key_of(row)).encode()).hexdigest()[:16]
    path = folder / f"{version}-{name}.json" if folder else None
    if path and path.exists():
        return json.loads(path.read_text())
    found = compiled(target, row)
    if path:
        path.write_text(json.dumps(found))
    return found


# One target, and all


def show(row: dict) -> None:
    start = f"{row['target']:8} {row['card']:9} {row['kernel']:36} {row['preset']:16} {row['batch']:2}"
    if "skipped" in row:
        print(f"{start}  {row['skipped']}", flush=True)
        return
    numbers = f"{row['blocks']:4} blocks {row['registers']:4} registers {row['spilled']:4} spilled"
    share = f"{row['shared_memory']:7} of {row['limit']} bytes"
    print(f"{start} {numbers} {share}  {'; '.join(faults_of(row)) or 'ok'}", flush=True)


def compile_target(args: argparse.Namespace) -> list[dict]:
    """All kernels of one target, in this process."""
    target = cards.capabilities()[args.targets[0]]
    version, rows = sources_hash(), []
    for row in wanted(target, args.preset, args.sequences, prompts=not args.decode_only):
        rows.append(remembered(target, row, version))
        show(rows[-1])
    return rows


def compile_apart(args: argparse.Namespace, environment: dict[str, str]) -> list[dict]:
    """Each target in a process of its own: Mosaic keeps the first target that a process compiles for."""

    def run(version: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scripts.compile_kernels", "--child", "--targets", version]
        command += ["--preset", *args.preset, "--sequences", *map(str, args.sequences)]
        command += ["--decode-only"] if args.decode_only else []
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)

    rows = []
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for version, done in zip(args.targets, pool.map(run, args.targets), strict=True):
            *table, last = done.stdout.splitlines() or [""]
            print("\n".join(table), flush=True)
            if not last.startswith("["):
                sys.exit(f"compiling for {version} failed: {done.stderr.strip()[-2000:] or done.returncode}")
            rows += json.loads(last)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", default=["Qwen3-30B-A3B"], choices=sorted(PRESETS))
    parser.add_argument("--targets", nargs="+", default=sorted(cards.capabilities()), metavar="CAPABILITY")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4], metavar="BATCH")
    parser.add_argument("--decode-only", action="store_true", help="leave out the kernels of prompts")
    parser.add_argument("--install", action="store_true", help="get what is missing with pip")
    parser.add_argument("--limits", type=Path, default=LIMITS, help="JSON that no kernel may exceed")
    parser.add_argument("--write", action="store_true", help="make what is found the limits")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(compile_target(args)))
        return
    folder = _absent_gpu.toolchain(install=args.install)
    if folder is None:
        print("SKIPPED: compiling for GPUs needs XLA's plugin and ptxas: use --install")
        return
    rows = compile_apart(args, _absent_gpu.compiling_environment(folder))
    faults = [f"{name_of(row)}: {fault}" for row in rows for fault in faults_of(row)]
    if args.write:
        write(rows, args.limits)
    else:
        faults += grown(rows, json.loads(args.limits.read_text())["kernels"])
    print(json.dumps({"jax": jax.__version__, "cuda": _absent_gpu.CUDA, "kernels": rows, "faults": faults}))
    sys.exit("; ".join(faults) or 0)


def write(rows: list[dict], path: Path) -> None:
    """Puts the rows into the file of limits; rows of other kernels stay."""
    old = json.loads(path.read_text())["kernels"] if path.exists() else []
    merged = {key_of(row): row for row in (*old, *rows)}
    facts = {
        "what": "kernels compiled by ptxas without a GPU: registers per thread, bytes spilled, bytes of "
        "shared memory; no kernel may exceed them. batch: sequences, or rows of a tile of a grouped product",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": "no GPU",
        "command": "python -m scripts.compile_kernels --install --write",
        "versions": {"jax": jax.__version__, "ptxas": _absent_gpu.CUDA},
    }
    write_rows(path, facts, "kernels", (merged[key] for key in sorted(merged)))


if __name__ == "__main__":
    main()

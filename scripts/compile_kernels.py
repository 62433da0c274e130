"""Compiles the one-kernel decode step for every NVIDIA target, without a GPU.

    python -m scripts.compile_kernels [--targets 8.9 9.0] [--sequences 1 4 8] [--json FILE]

Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt of JAX's version, and CUDA's ptxas; without them it
says so and ends with 0. It prints registers, spilled bytes and shared memory of each target; the last line
is JSON. It ends with an error where a kernel spills more than a few words, does not fit, or could have two
blocks on one multiprocessor, and with ``--limits FILE`` (an earlier run's JSON) where registers or bytes
have grown.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.config import shared_memory_budget
from qwen3_moe_jax.kernels_pallas.gpu import cards
from qwen3_moe_jax.testing.decode_kernel import trace_step
from scripts._captured import captured_output

THREADS = 256
"""Of a block."""
MAX_SPILLED = 64
"""Bytes: on Hopper 5 and 7 sequences spill 24, on Ada 4 spill 48, which is a few words per thread."""
DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {per_core} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 1000000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.9
  device_memory_size: 25769803776 shared_memory_per_block_optin: {per_block}
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
  registers_per_core_limit: {registers} registers_per_block_limit: {registers}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def missing() -> str | None:
    """What this machine lacks to compile for a GPU, or None."""
    if not all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_plugins"))):
        return "a plugin (pip install jax-cuda13-plugin jax-cuda13-pjrt)"
    return None if shutil.which("ptxas") else "ptxas (CUDA's assembler) on PATH"


def sharding_of(target: cards.Capability, name: str, cores: int) -> SingleDeviceSharding:
    """One GPU that is not there."""
    jax.devices()  # makes the plugin known
    major, minor = target.number
    text = DESCRIPTION.format(
        per_core=target.shared_memory_per_core, per_block=target.shared_memory, cores=cores,
        registers=target.registers_per_core, major=major, minor=minor, name=name,
        feature="feature_extension: ACCELERATED_FEATURES" if target.target.endswith("a") else "",
    )  # fmt: skip
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=target.target, topology="1x1x1", target_config=text
    )
    return SingleDeviceSharding(topology.devices[0])


@contextlib.contextmanager
def compiling_for(target: cards.Capability) -> Iterator[None]:
    """Mosaic makes code for the target: without a device it would take Hopper's."""
    with mock.patch("jax.experimental.mosaic.gpu.utils._infer_arch", return_value=target.number):
        yield


def ptxas_report(text: str) -> dict[str, int]:
    """Registers of a thread and bytes spilled, the most of any kernel."""
    patterns = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill (?:stores|loads)"}
    return {name: max(map(int, re.findall(p, text)), default=0) for name, p in patterns.items()}


def compile_step(target: cards.Capability, name: str, preset: str, kernels: str, batch: int) -> dict:
    """One row of the table."""
    cores = target.multiprocessors[name]
    device = api.Device.of_cores(cores, kernels=kernels, shared_memory=target.shared_memory)
    row = {"target": target.target, "card": name, "preset": preset, "kernels": kernels, "batch": batch}
    config = PRESETS[preset]
    largest = api.kernel_batch(config, device)
    if batch > largest:
        return row | {"skipped": f"takes kernels of {largest}"}
    shape = api.shape_config(config, batch, device)
    row |= {"blocks": shape.blocks, "shared_memory": sum(shared_memory_budget(shape).values())}
    sharding = sharding_of(target, name, cores)
    with compiling_for(target), captured_output() as lines:
        traced = trace_step(config, batch=batch, device=device, sharding=sharding)
        traced.lower(lowering_platforms=("cuda",)).compile()
    row |= ptxas_report("\n".join(lines))
    per_core = min(
        target.registers_per_core // (THREADS * max(-(-row["registers"] // 8) * 8, 1)),
        target.shared_memory_per_core // (row["shared_memory"] + 1024),
    )
    faults = []
    if not row["registers"]:
        faults.append("ptxas reported nothing")
    if row["spilled"] > MAX_SPILLED:
        faults.append(f"spills {row['spilled']} bytes")
    if row["shared_memory"] > target.shared_memory:
        faults.append("too much shared memory")
    if per_core != 1:
        faults.append(f"{per_core} blocks fit a multiprocessor")
    return row | {"faults": faults}


def grown(rows: list[dict], limits: Path) -> list[str]:
    """What takes more than in an earlier run."""
    key = lambda row: tuple(row[name] for name in ("target", "preset", "kernels", "batch"))
    before = {key(row): row for row in json.loads(limits.read_text())["kernels"]}
    found = []
    for row in rows:
        old = before.get(key(row), {})
        for name in ("registers", "spilled", "shared_memory"):
            if name in old and row.get(name, 0) > old[name]:
                found.append(f"{row['target']} batch {row['batch']}: {name} {row[name]}, before {old[name]}")
    return found


def show(row: dict) -> None:
    start = f"{row['target']:8} {row['card']:9} {row['kernels']:8} {row['batch']:2}"
    if "skipped" in row:
        print(f"{start}  {row['skipped']}", flush=True)
        return
    numbers = f"{row['blocks']:4} blocks {row['registers']:4} registers {row['spilled']:5} spilled"
    share = f"{row['shared_memory']:7} of {cards.capability_of(row['target']).shared_memory} bytes"
    print(f"{start} {numbers} {share}  {'; '.join(row['faults']) or 'ok'}", flush=True)


def compile_target(args: argparse.Namespace) -> list[dict]:
    """All kernels of one target."""
    target = cards.capabilities()[args.targets[0]]
    card = next(iter(target.multiprocessors))
    rows = []
    for kernels in ("hopper", "portable") if target.version == "9.0" else ("portable",):
        for batch in args.sequences:
            rows.append(compile_step(target, card, args.preset, kernels, batch))
            show(rows[-1])
    return rows


def compile_apart(args: argparse.Namespace) -> list[dict]:
    """Each target in a process of its own: Mosaic keeps the first target that a process compiles for."""
    rows = []
    for version in args.targets:
        command = [sys.executable, "-m", "scripts.compile_kernels", "--targets", version]
        command += ["--preset", args.preset, "--sequences", *map(str, args.sequences)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        *table, last = done.stdout.splitlines() or [""]
        print("\n".join(table), flush=True)
        if not last.startswith("{"):
            sys.exit(f"compiling for {version} failed: {last or done.returncode}")
        rows += json.loads(last)["kernels"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=sorted(PRESETS))
    parser.add_argument("--targets", nargs="+", default=sorted(cards.capabilities()), metavar="CAPABILITY")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--limits", type=Path, help="an earlier result, which none may exceed")
    args = parser.parse_args()
    if lacks := missing():
        print(f"SKIPPED: compiling for GPUs needs {lacks}")
        return
    rows = compile_target(args) if len(args.targets) == 1 else compile_apart(args)
    name = lambda row: f"{row['target']} {row['kernels']} batch {row['batch']}"
    faults = [f"{name(row)}: {fault}" for row in rows for fault in row.get("faults", ())]
    faults += grown(rows, args.limits) if args.limits else []
    result = json.dumps({"jax": jax.__version__, "kernels": rows, "faults": faults})
    if args.json:
        args.json.write_text(result + "\n")
    print(result)
    sys.exit("; ".join(faults) or 0)


if __name__ == "__main__":
    main()

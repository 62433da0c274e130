"""GPUs that are not there: what compiling for them needs, their description for XLA, and what ptxas says."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from qwen3_moe_jax.kernels_pallas.gpu import cards
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.machine.folders import writable_cache

CUDA = "13.0.88"
"""The version of ptxas and of the device library that checks are made with: figures depend on it."""

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


def packages() -> list[str]:
    """What pip installs beside JAX to compile for NVIDIA GPUs, 270 MB: XLA's plugin, ptxas, libdevice."""
    version = metadata.version("jaxlib")
    jax_parts = [f"jax-cuda13-{part}=={version}" for part in ("plugin", "pjrt")]
    return [*jax_parts, *(f"nvidia-{part}=={CUDA}" for part in ("cuda-nvcc", "nvvm"))]


def toolchain(*, install: bool) -> Path | None:
    """The folder that holds ``packages()``, in the user's cache; None where it is not there.

    It is apart from the environment: a plugin in it would look for a GPU whenever JAX starts.

    Args:
      install: fill it with pip where it is not there.
    """
    name = f"cuda-{metadata.version('jaxlib')}-{CUDA}-py{sys.version_info[0]}{sys.version_info[1]}"
    folder = writable_cache(name)
    if folder is None:
        return None
    if not (folder / "done").exists() and install:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--no-deps", "--upgrade", "--target", str(folder), *packages()], check=True)
        (folder / "done").touch()
    return folder if (folder / "done").exists() else None


def compiling_environment(folder: Path) -> dict[str, str]:
    """The environment of a child process that compiles with a :func:`toolchain`."""
    cuda = folder / "nvidia" / "cu13"
    path = os.pathsep.join([str(cuda / "bin"), os.environ.get("PATH", "")])
    found = child_environment(CUDA_ROOT=str(cuda), PATH=path, JAX_PLATFORMS="cpu", MOSAIC_GPU_DUMP_PTXAS="1")
    return {**found, "PYTHONPATH": os.pathsep.join([found["PYTHONPATH"], str(folder)])}


def missing() -> str | None:
    """What this process lacks to compile for a GPU, or None."""
    if not all(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_plugins"))):
        return "a plugin (python -m scripts.compile_kernels --install)"
    return None if shutil.which("ptxas") else "ptxas (CUDA's assembler) on PATH"


def ptxas_version() -> str:
    """Such as "13.0.88"."""
    said = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def first_card(target: cards.Capability) -> tuple[str, int]:
    """The name and the multiprocessors of the card that stands for a compute capability."""
    return next(iter(target.multiprocessors.items()))


def sharding_of(target: cards.Capability) -> SingleDeviceSharding:
    """One GPU of this compute capability that is not there."""
    jax.devices()  # makes the plugin known
    (major, minor), (name, cores) = target.number, first_card(target)
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
    """Registers of a thread and bytes spilled, the most of any kernel; 0 where nothing is said."""
    patterns = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill (?:stores|loads)"}
    return {name: max(map(int, re.findall(p, text)), default=0) for name, p in patterns.items()}


__all__ = [
    "CUDA",
    "compiling_environment",
    "compiling_for",
    "first_card",
    "missing",
    "packages",
    "ptxas_report",
    "ptxas_version",
    "sharding_of",
    "toolchain",
]

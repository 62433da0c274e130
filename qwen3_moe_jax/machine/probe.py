"""What this machine has and what follows from it: the facts behind ``doctor`` and the choice of a backend."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass, field

from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.machine.memory import MemoryPlan, total_main_memory
from qwen3_moe_jax.wgpu_backend.adapter import list_adapters

KERNEL_JAX = (0, 11)
"""The Pallas kernels are written for the Mosaic GPU API of this JAX version and later."""

KERNEL_CAPABILITY = "9.0"
"""Compute capability that the Pallas kernels are built for (Hopper)."""

OLDEST_DRIVER = {"cuda12": 525, "cuda13": 580}
"""Oldest NVIDIA driver of each CUDA major version: https://docs.nvidia.com/deploy/cuda-compatibility."""


@dataclass(frozen=True)
class NvidiaGpu:
    """One card as ``nvidia-smi`` lists it; memory in bytes."""

    name: str
    driver: str
    capability: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """Facts; ``detect`` gathers them, ``diagnose`` judges them.

    Attributes:
      python: version numbers.
      packages: installed versions by name; a missing package is absent.
      memory: bytes of main memory; None where unknown.
      nvidia_gpus: cards that the driver knows.
      jax_platforms: platforms of JAX's devices, or the error that JAX raised.
      wgpu_adapters: names of WebGPU adapters, hardware ones first.
      wgpu_hardware: whether the first is hardware.
    """

    python: tuple[int, ...]
    packages: dict[str, str] = field(default_factory=dict)
    memory: int | None = None
    nvidia_gpus: tuple[NvidiaGpu, ...] = ()
    jax_platforms: tuple[str, ...] = ()
    jax_error: str | None = None
    wgpu_adapters: tuple[str, ...] = ()
    wgpu_hardware: bool = False


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
      level: "ok", "note" (works, could be better) or "problem".
      subject: what was looked at.
      text: what was found.
      advice: the one thing to do, or "".
    """

    level: str
    subject: str
    text: str
    advice: str = ""


PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "numpy",
    "orbax-checkpoint",
    "wgpu",
)


def detect() -> Machine:
    """Looks at this machine; never raises."""
    set_jax_memory_policy()
    platforms, jax_error = _jax_platforms()
    adapters = sorted(list_adapters(), key=lambda a: a.software)
    return Machine(
        python=tuple(int(n) for n in platform.python_version_tuple()[:2]),
        packages={n: v for n in PACKAGES if (v := _version(n))},
        memory=total_main_memory(),
        nvidia_gpus=nvidia_gpus(),
        jax_platforms=platforms,
        jax_error=jax_error,
        wgpu_adapters=tuple(a.summary for a in adapters),
        wgpu_hardware=any(not a.software for a in adapters),
    )


def set_jax_memory_policy() -> None:
    """Keeps XLA from taking most of a card at start; a user's own setting stays."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_gpus() -> tuple[NvidiaGpu, ...]:
    """The cards that ``nvidia-smi`` lists; none where there is no driver."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,compute_cap,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in found.stdout.splitlines()]
    if found.returncode:
        return ()
    return tuple(NvidiaGpu(r[0], r[1], r[2], int(r[3]) << 20) for r in rows if len(r) == 4 and r[3].isdigit())


def _jax_platforms() -> tuple[tuple[str, ...], str | None]:
    try:
        import jax

        return tuple(d.platform for d in jax.devices()), None
    except Exception as error:  # whatever a broken installation raises is the finding
        return (), _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def diagnose(machine: Machine) -> list[Finding]:
    """Judges the facts: software, NVIDIA GPU, WebGPU, in this order."""
    return [_judge_software(machine), *_judge_nvidia(machine), _judge_wgpu(machine)]


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".")[:2] if n.isdigit())


def _judge_software(machine: Machine) -> Finding:
    python = ".".join(map(str, machine.python))
    jax = machine.packages.get("jax")
    if jax is None:
        return Finding("problem", "JAX", "not installed", "pip install qwen3-moe-jax")
    if machine.jax_error:
        return Finding(
            "problem", "JAX", f"{jax} does not start: {machine.jax_error}", "pip install -U qwen3-moe-jax"
        )
    if _version_numbers(jax) < KERNEL_JAX:
        return Finding(
            "note",
            "JAX",
            f"{jax} on Python {python}: everything runs but the Pallas GPU kernels",
            "use Python 3.12 or newer, which gets JAX 0.11",
        )
    return Finding("ok", "JAX", f"{jax} on Python {python}")


def _judge_nvidia(machine: Machine) -> list[Finding]:
    if not machine.nvidia_gpus:
        return [Finding("note", "NVIDIA GPU", "none found (nvidia-smi lists no card)")]
    findings = []
    plugins = [n for n in ("cuda13", "cuda12") if f"jax-{n}-plugin" in machine.packages]
    for gpu in machine.nvidia_gpus:
        card = f"{gpu.name}, {gpu.memory / 1e9:.0f} GB, driver {gpu.driver}"
        what = f"{card}, sm_{gpu.capability.replace('.', '')}"
        findings.append(_judge_card(gpu, what, plugins, machine))
    return findings


def _judge_card(gpu: NvidiaGpu, what: str, plugins: list[str], machine: Machine) -> Finding:
    driver = int(gpu.driver.split(".")[0])
    if not plugins:
        extra = "cuda13" if driver >= OLDEST_DRIVER["cuda13"] else "cuda12"
        return Finding(
            "problem",
            "NVIDIA GPU",
            f"{what}: JAX has no CUDA plugin",
            f"pip install 'qwen3-moe-jax[{extra}]'",
        )
    needed = OLDEST_DRIVER[plugins[0]]
    if driver < needed:
        return Finding(
            "problem",
            "NVIDIA GPU",
            f"{what}: the {plugins[0]} plugin needs driver {needed} or newer",
            f"update the driver (the cuda12 extra needs {OLDEST_DRIVER['cuda12']} or newer)",
        )
    if "gpu" not in machine.jax_platforms:
        return Finding(
            "problem",
            "NVIDIA GPU",
            f"{what}: JAX does not see it (its devices: {', '.join(machine.jax_platforms) or 'none'})",
            "check JAX_PLATFORMS and CUDA_VISIBLE_DEVICES, then run `python -c 'import jax; jax.devices()'`",
        )
    if gpu.capability != KERNEL_CAPABILITY:
        return Finding(
            "note",
            "NVIDIA GPU",
            f"{what}: the Pallas kernels are for sm_90 (H100, H200); the slower XLA operations run here",
        )
    return Finding("ok", "NVIDIA GPU", what)


def _judge_wgpu(machine: Machine) -> Finding:
    if not machine.wgpu_adapters:
        return Finding(
            "note",
            "WebGPU",
            "no adapter",
            "install a Vulkan driver (Debian: apt install mesa-vulkan-drivers)",
        )
    names = ", ".join(machine.wgpu_adapters)
    return Finding("ok", "WebGPU", names if machine.wgpu_hardware else f"software only: {names}")


def judge_memory(machine: Machine, plan: MemoryPlan) -> Finding:
    """Whether a model fits: the GPU's memory where JAX uses one, else main memory."""
    on_gpu = "gpu" in machine.jax_platforms and machine.nvidia_gpus
    have = machine.nvidia_gpus[0].memory if on_gpu else machine.memory
    where = machine.nvidia_gpus[0].name if on_gpu else "main memory"
    try:
        plan.check(have, where)
    except MemoryPlanError as error:
        what, advice = str(error).rsplit(": ", 1)
        return Finding("problem", "memory", what, advice)
    if have is None:
        return Finding("note", "memory", f"{plan}; this system does not say how much it has")
    return Finding("ok", "memory", f"{plan} fit {where} of {have / 1e9:.1f} GB")

"""What this machine has and what follows from it: the facts behind ``doctor`` and the choice of a backend."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qwen3_moe_jax.core.errors import BackendUnavailableError, MemoryPlanError
from qwen3_moe_jax.machine import environment
from qwen3_moe_jax.machine.folders import CACHE_VARIABLE, cache_folder
from qwen3_moe_jax.machine.headroom import Headroom, available_memory, main_memory
from qwen3_moe_jax.machine.jax_devices import (
    CARDS_VARIABLE,
    PLATFORMS_VARIABLE,
    jax_devices,
    platforms_wanted,
)
from qwen3_moe_jax.machine.kernels import AUTO, KERNEL_JAX, choose_kernels
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.nvidia import NvidiaGpu, nvidia_report

MIN_DRIVER = {"cuda12": 525, "cuda13": 580}
"""Oldest NVIDIA driver of each CUDA major version: https://docs.nvidia.com/deploy/cuda-compatibility."""


class Adapter(Protocol):
    """What is asked of a WebGPU adapter (``wgpu_backend.adapter.AdapterReport``)."""

    @property
    def summary(self) -> str:
        """Name, kind and API on one line."""
        ...

    @property
    def software(self) -> bool:
        """Whether it runs on the CPU."""
        ...


@dataclass(frozen=True)
class Machine:
    """Facts; ``detect`` gathers them, ``diagnose`` judges them.

    Attributes:
      python: version numbers.
      packages: installed versions by name; a missing package is absent.
      memory: what is free where the jax backend would put a model.
      nvidia_gpus: cards that the driver knows.
      nvidia_fault: why the driver lists none though it is there.
      hidden_cards: the setting that keeps JAX from cards that are there, such as ``JAX_PLATFORMS=cpu``.
      jax_platforms: platforms of JAX's devices.
      environment: faults of environment variables (``environment.faults``).
      jax_error: why JAX does not start.
      wgpu_adapters: names of WebGPU adapters, hardware ones first.
      wgpu_hardware: whether the first is hardware.
    """

    python: tuple[int, ...]
    packages: dict[str, str] = field(default_factory=dict[str, str])
    memory: Headroom = field(default_factory=lambda: Headroom(None))
    nvidia_gpus: tuple[NvidiaGpu, ...] = ()
    nvidia_fault: str = ""
    hidden_cards: str = ""
    jax_platforms: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    jax_error: str | None = None
    wgpu_adapters: tuple[str, ...] = ()
    wgpu_hardware: bool = False


@dataclass(frozen=True)
class Diagnosis:
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


def detect(adapters: Sequence[Adapter] = ()) -> Machine:
    """Looks at this machine; never raises.

    Args:
      adapters: of WebGPU, as the backend lists them.
    """
    platforms, jax_error, memory = _jax()
    adapters = sorted(adapters, key=lambda a: a.software)
    nvidia = nvidia_report()
    return Machine(
        python=tuple(int(n) for n in platform.python_version_tuple()[:2]),
        packages={n: v for n in PACKAGES if (v := _version(n))},
        memory=memory,
        nvidia_gpus=nvidia.gpus,
        nvidia_fault=nvidia.fault,
        hidden_cards=cards_are_hidden_by(),
        jax_platforms=platforms,
        environment=tuple(environment.faults()),
        jax_error=jax_error,
        wgpu_adapters=tuple(a.summary for a in adapters),
        wgpu_hardware=any(not a.software for a in adapters),
    )


_CARD = re.compile(r"\d|GPU-|MIG-")
"""How CUDA's list of cards begins that are seen; it ends at the first word that names none."""


def cards_are_hidden_by() -> str:
    """The user's setting that keeps JAX from NVIDIA cards, such as ``JAX_PLATFORMS=cpu``; "" for none."""
    return _hidden_by(*platforms_wanted())


def environment_hides_cards() -> bool:
    """As ``cards_are_hidden_by``, by environment variables alone: JAX is not imported."""
    return bool(_hidden_by(os.environ.get(PLATFORMS_VARIABLE, ""), PLATFORMS_VARIABLE))


def _hidden_by(wanted: str, origin: str) -> str:
    if wanted and not {"cuda", "gpu"} & set(wanted.split(",")):
        return f"{origin}={wanted}"
    visible = os.environ.get(CARDS_VARIABLE)
    if visible is not None and not _CARD.match(visible.strip()):
        return f"{CARDS_VARIABLE}={visible!r}"
    return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _jax() -> tuple[tuple[str, ...], str | None, Headroom]:
    """Platforms of JAX's devices, why there are none, and the memory of the first."""
    try:
        devices = jax_devices()
    except (BackendUnavailableError, MemoryPlanError) as error:
        return (), str(error), main_memory()
    return tuple(d.platform for d in devices), None, available_memory(devices[0])


def diagnose(machine: Machine) -> list[Diagnosis]:
    """Judges the facts: software, environment, NVIDIA GPU, WebGPU, in this order."""
    return [
        _judge_software(machine),
        *_judge_environment(machine),
        *_judge_nvidia(machine),
        _judge_wgpu(machine),
    ]


def _version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split(".")[:2] if n.isdigit())


def _judge_environment(machine: Machine) -> list[Diagnosis]:
    parts = (fault.rsplit(": ", 1) for fault in machine.environment)
    return [Diagnosis("problem", "environment", what, advice) for what, advice in parts]


def _judge_software(machine: Machine) -> Diagnosis:
    python = ".".join(map(str, machine.python))
    jax = machine.packages.get("jax")
    if jax is None:
        return Diagnosis("problem", "JAX", "not installed", "pip install qwen3-moe-jax")
    if machine.jax_error:
        what, _, advice = machine.jax_error.rpartition("): ")
        if not what:
            return Diagnosis("problem", "JAX", f"{jax}: {machine.jax_error}", "pip install -U qwen3-moe-jax")
        return Diagnosis("problem", "JAX", f"{jax}: {what})", advice)
    if _version_numbers(jax) < KERNEL_JAX:
        return Diagnosis(
            "note",
            "JAX",
            f"{jax} on Python {python}: everything runs but the Pallas GPU kernels",
            "use Python 3.12 or newer, which gets JAX 0.11",
        )
    return Diagnosis("ok", "JAX", f"{jax} on Python {python}")


def _judge_nvidia(machine: Machine) -> list[Diagnosis]:
    if machine.nvidia_fault:
        return [
            Diagnosis(
                "problem",
                "NVIDIA GPU",
                machine.nvidia_fault,
                "repair the driver until `nvidia-smi` lists the card",
            )
        ]
    if not machine.nvidia_gpus:
        return [Diagnosis("note", "NVIDIA GPU", "none found (nvidia-smi lists no card)")]
    plugins = [n for n in ("cuda13", "cuda12") if f"jax-{n}-plugin" in machine.packages]
    return [_judge_card(gpu, plugins, machine) for gpu in machine.nvidia_gpus]


def describe_card(gpu: NvidiaGpu) -> str:
    """One line; what the driver does not tell is left out."""
    parts = [gpu.name]
    if gpu.memory is not None:
        parts.append(f"{gpu.memory / 1e9:.0f} GB")
    parts.append(f"driver {gpu.driver}" if gpu.driver else "driver unknown")
    if gpu.capability:
        parts.append(f"sm_{gpu.capability.replace('.', '')}")
    if gpu.is_partitioned:
        parts.append("MIG on")
    return ", ".join(parts)


def _judge_card(gpu: NvidiaGpu, plugins: list[str], machine: Machine) -> Diagnosis:
    what, driver = describe_card(gpu), gpu.driver_major
    if machine.hidden_cards:
        text = f"{what}: not used, for {machine.hidden_cards} hides it"
        return Diagnosis("note", "NVIDIA GPU", text, f"unset {machine.hidden_cards.split('=')[0]} to use it")
    if not plugins:
        is_new = driver is None or driver >= MIN_DRIVER["cuda13"]
        advice = f"pip install 'qwen3-moe-jax[{'cuda13' if is_new else 'cuda12'}]'"
        return Diagnosis("problem", "NVIDIA GPU", f"{what}: JAX has no CUDA plugin", advice)
    needed = MIN_DRIVER[plugins[0]]
    if driver is not None and driver < needed:
        return Diagnosis(
            "problem",
            "NVIDIA GPU",
            f"{what}: the {plugins[0]} plugin needs driver {needed} or newer",
            f"update the driver (the cuda12 extra needs {MIN_DRIVER['cuda12']} or newer)",
        )
    if "gpu" not in machine.jax_platforms:
        return Diagnosis(
            "problem",
            "NVIDIA GPU",
            f"{what}: JAX does not see it (its devices: {', '.join(machine.jax_platforms) or 'none'})",
            "check JAX_PLATFORMS and CUDA_VISIBLE_DEVICES, then run `python -c 'import jax; jax.devices()'`",
        )
    if not gpu.capability:
        return Diagnosis("ok", "NVIDIA GPU", what)
    chosen = choose_kernels(AUTO, gpu.capability, _version_numbers(machine.packages.get("jax", "")))
    level = "note" if chosen.name == "xla" else "ok"
    return Diagnosis(level, "NVIDIA GPU", f"{what}: {chosen.name} kernels ({chosen.reason})")


def _judge_wgpu(machine: Machine) -> Diagnosis:
    if not machine.wgpu_adapters:
        return Diagnosis(
            "note",
            "WebGPU",
            "no adapter",
            "install a Vulkan driver (Debian: apt install mesa-vulkan-drivers)",
        )
    names = ", ".join(machine.wgpu_adapters)
    return Diagnosis("ok", "WebGPU", names if machine.wgpu_hardware else f"software only: {names}")


def judge_memory(machine: Machine, plan: MemoryPlan) -> Diagnosis:
    """Whether a model fits what is free, as a load would judge it, and which limit sets that."""
    plan = plan.settled(machine.memory)
    try:
        plan.check(machine.memory)
    except MemoryPlanError as error:
        what, advice = str(error).rsplit(": ", 1)
        return Diagnosis("problem", "memory", what, advice)
    if machine.memory.nbytes is None:
        return Diagnosis("note", "memory", f"{plan}; this system does not say how much it has")
    if plan.is_mapped:
        what = f"{plan} fit {machine.memory}: what memory does not hold is read from the disk when it is used"
        if (folder := cache_folder()) is None:
            return Diagnosis("problem", "memory", what, f"{CACHE_VARIABLE} names a folder for that file")
        advice = f"a load writes the file once, {plan.weights / 1e9:.2f} GB, to {folder}"
        return Diagnosis("note", "memory", what, advice)
    return Diagnosis("ok", "memory", f"{plan} fit {machine.memory}")

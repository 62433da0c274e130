"""What the doctor says of machines that we do not have."""

from dataclasses import replace

import pytest

from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.nvidia import NvidiaGpu
from qwen3_moe_jax.machine.probe import Machine, detect, diagnose, judge_memory

H100 = NvidiaGpu("NVIDIA H100 80GB HBM3", "580.159.04", "9.0", 80 << 30)
GOOD = Machine(
    python=(3, 12),
    packages={"jax": "0.11.2", "jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2"},
    memory=Headroom(80 << 30, "NVIDIA H100 80GB HBM3"),
    nvidia_gpus=(H100,),
    jax_platforms=("gpu",),
    wgpu_adapters=("NVIDIA H100 (DiscreteGPU) via Vulkan",),
    wgpu_hardware=True,
)
CPU_ONLY = replace(GOOD, nvidia_gpus=(), jax_platforms=("cpu",), wgpu_adapters=(), wgpu_hardware=False)


def finding(machine: Machine, subject: str):
    return next(f for f in diagnose(machine) if f.subject == subject)


def without(machine: Machine, package: str) -> Machine:
    return replace(machine, packages={k: v for k, v in machine.packages.items() if k != package})


def test_a_good_machine_has_no_problem():
    assert {f.level for f in diagnose(GOOD)} == {"ok"}


@pytest.mark.parametrize(
    ("machine", "subject", "level", "text", "advice"),
    [
        (without(GOOD, "jax-cuda13-plugin"), "NVIDIA GPU", "problem", "no CUDA plugin", "[cuda13]"),
        (
            replace(without(GOOD, "jax-cuda13-plugin"), nvidia_gpus=(replace(H100, driver="550.1"),)),
            "NVIDIA GPU",
            "problem",
            "no CUDA plugin",
            "[cuda12]",
        ),
        (
            replace(GOOD, nvidia_gpus=(replace(H100, driver="550.1"),)),
            "NVIDIA GPU",
            "problem",
            "driver 580",
            "update",
        ),
        (replace(GOOD, jax_platforms=("cpu",)), "NVIDIA GPU", "problem", "does not see it", "JAX_PLATFORMS"),
        (
            replace(GOOD, nvidia_gpus=(replace(H100, name="NVIDIA A100", capability="8.0"),)),
            "NVIDIA GPU",
            "ok",
            "sm_80: portable kernels",
            "",
        ),
        (CPU_ONLY, "NVIDIA GPU", "note", "none found", ""),
        (CPU_ONLY, "WebGPU", "note", "no adapter", "mesa-vulkan-drivers"),
        (
            replace(CPU_ONLY, wgpu_adapters=("llvmpipe (CPU) via Vulkan",)),
            "WebGPU",
            "ok",
            "software only: llvmpipe",
            "",
        ),
        (
            replace(GOOD, python=(3, 11), packages={"jax": "0.10.2"}),
            "JAX",
            "note",
            "everything runs but the Pallas GPU kernels",
            "Python 3.12",
        ),
        (replace(GOOD, packages={}), "JAX", "problem", "not installed", "pip install"),
        (
            replace(GOOD, jax_error="JAX does not start: no"),
            "JAX",
            "problem",
            "does not start",
            "pip install -U",
        ),
    ],
)
def test_each_fault_has_its_line_and_one_thing_to_do(machine, subject, level, text, advice):
    found = finding(machine, subject)
    assert found.level == level
    assert text in found.text
    assert advice in found.advice


@pytest.mark.parametrize(
    ("machine", "model_gb", "cache_gb", "level", "advice"),
    [
        (GOOD, 18.6, 3.2, "ok", ""),
        (GOOD, 18.6, 80.0, "problem", "max_context"),
        (GOOD, 142.0, 1.0, "problem", "more memory"),
        (replace(CPU_ONLY, memory=Headroom(24 << 30)), 18.6, 0.8, "ok", ""),
        (replace(CPU_ONLY, memory=Headroom(16 << 30)), 18.6, 0.8, "note", "writes the file once, 18.60 GB"),
        (replace(CPU_ONLY, memory=Headroom(2 << 30)), 18.6, 0.8, "problem", "more memory"),
        (replace(CPU_ONLY, memory=Headroom(None)), 18.6, 0.8, "note", ""),
    ],
)
def test_memory_plan(machine, model_gb, cache_gb, level, advice):
    plan = MemoryPlan(weights=int(model_gb * 1e9), cache=int(cache_gb * 1e9), context=4096)
    found = judge_memory(machine, plan)
    assert found.level == level
    assert advice in found.advice


def test_detect_looks_at_the_real_machine():
    machine = detect()
    assert "cpu" in machine.jax_platforms
    assert machine.memory.nbytes
    assert machine.packages["jax"]

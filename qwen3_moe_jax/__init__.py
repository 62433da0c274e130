"""Qwen3-MoE models straight from GGUF files in JAX, with a parity proof on your own machine.

>>> import qwen3_moe_jax as q3
>>> model = q3.load()                       # the embedded model; or a .gguf, or a packed checkpoint
>>> model.generate("def fib(n):", max_tokens=16)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from qwen3_moe_jax.api import Model, load
    from qwen3_moe_jax.convert.errors import ModelFileError
    from qwen3_moe_jax.core.errors import (
        BackendUnavailableError,
        BatchFullError,
        ContextOverflowError,
        HubError,
        MemoryPlanError,
        ModelClosedError,
        NumericalError,
        ParityError,
    )
    from qwen3_moe_jax.core.sampling import Sampling
    from qwen3_moe_jax.inspection.interventions import ablate_expert, force_experts, steer
    from qwen3_moe_jax.jax_backend.qwen3_moe import Intervention
    from qwen3_moe_jax.machine.processes import Processes
    from qwen3_moe_jax.measure.perplexity import Perplexity
    from qwen3_moe_jax.text.answer import Answer

_HOMES = {
    "Answer": "qwen3_moe_jax.text.answer",
    "BackendUnavailableError": "qwen3_moe_jax.core.errors",
    "BatchFullError": "qwen3_moe_jax.core.errors",
    "ContextOverflowError": "qwen3_moe_jax.core.errors",
    "HubError": "qwen3_moe_jax.core.errors",
    "Intervention": "qwen3_moe_jax.jax_backend.qwen3_moe",
    "MemoryPlanError": "qwen3_moe_jax.core.errors",
    "Model": "qwen3_moe_jax.api",
    "ModelClosedError": "qwen3_moe_jax.core.errors",
    "ModelFileError": "qwen3_moe_jax.convert.errors",
    "NumericalError": "qwen3_moe_jax.core.errors",
    "ParityError": "qwen3_moe_jax.core.errors",
    "Perplexity": "qwen3_moe_jax.measure.perplexity",
    "Processes": "qwen3_moe_jax.machine.processes",
    "Sampling": "qwen3_moe_jax.core.sampling",
    "ablate_expert": "qwen3_moe_jax.inspection.interventions",
    "force_experts": "qwen3_moe_jax.inspection.interventions",
    "load": "qwen3_moe_jax.api",
    "steer": "qwen3_moe_jax.inspection.interventions",
}

__all__ = [
    "Answer",
    "BackendUnavailableError",
    "BatchFullError",
    "ContextOverflowError",
    "HubError",
    "Intervention",
    "MemoryPlanError",
    "Model",
    "ModelClosedError",
    "ModelFileError",
    "NumericalError",
    "ParityError",
    "Perplexity",
    "Processes",
    "Sampling",
    "ablate_expert",
    "force_experts",
    "load",
    "steer",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: the wgpu and reference backends never load JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qwen3_moe_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, which are not here before they are used, and a module's own."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

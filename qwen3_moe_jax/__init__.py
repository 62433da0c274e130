"""Qwen3-MoE models straight from GGUF files in JAX, with a parity proof on your own machine.

>>> import qwen3_moe_jax as q3
>>> model = q3.load()                       # the embedded model; or a .gguf, or a packed checkpoint
>>> model.generate("def fib(n):", max_tokens=16)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.errors import ModelFileError
    from qwen3_moe_jax.api import Answer, Model
    from qwen3_moe_jax.errors import (
        BackendUnavailableError,
        BatchFullError,
        ContextOverflowError,
        MemoryPlanError,
        NumericalError,
        ParityError,
    )
    from qwen3_moe_jax.loader import load
    from qwen3_moe_jax.model import Intervention
    from qwen3_moe_jax.parity.research import ablate_expert, force_experts, steer
    from qwen3_moe_jax.perplexity import Perplexity
    from qwen3_moe_jax.sampling import Sampling

_HOMES = {
    "Answer": "qwen3_moe_jax.api",
    "BackendUnavailableError": "qwen3_moe_jax.errors",
    "BatchFullError": "qwen3_moe_jax.errors",
    "ContextOverflowError": "qwen3_moe_jax.errors",
    "Intervention": "qwen3_moe_jax.model",
    "MemoryPlanError": "qwen3_moe_jax.errors",
    "Model": "qwen3_moe_jax.api",
    "ModelFileError": "convert.errors",
    "NumericalError": "qwen3_moe_jax.errors",
    "ParityError": "qwen3_moe_jax.errors",
    "Perplexity": "qwen3_moe_jax.perplexity",
    "Sampling": "qwen3_moe_jax.sampling",
    "ablate_expert": "qwen3_moe_jax.parity.research",
    "force_experts": "qwen3_moe_jax.parity.research",
    "load": "qwen3_moe_jax.loader",
    "steer": "qwen3_moe_jax.parity.research",
}

__all__ = [
    "Answer",
    "BackendUnavailableError",
    "BatchFullError",
    "ContextOverflowError",
    "Intervention",
    "MemoryPlanError",
    "Model",
    "ModelFileError",
    "NumericalError",
    "ParityError",
    "Perplexity",
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

"""The decode kernel's primitives: what Pallas has no name for, in bodies of the same names.

``sm90`` is for Hopper, ``sm80`` for every NVIDIA GPU from Ampere on, ``emulated`` plain ``jnp`` that Pallas'
interpreter runs on a CPU. All other code of the kernel is the same in the three.
"""

import importlib
from typing import Any

from qwen3_moe_jax.kernels_pallas.decode_step.primitives.names import Primitives

BODIES = ("sm90", "sm80", "emulated")


def choose(kernels: str, *, emulate: bool) -> Primitives:
    """The bodies for ``kernels`` ("hopper" or "portable"), or those of the interpreter."""
    name = "emulated" if emulate else {"hopper": "sm90", "portable": "sm80"}[kernels]
    body: Any = importlib.import_module(f"{__name__}.{name}")
    return body

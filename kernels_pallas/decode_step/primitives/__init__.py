"""The decode kernel's primitives: what Pallas has no name for, in bodies of the same names.

``sm90`` is for Hopper, ``sm80`` for every NVIDIA GPU from Ampere on, ``emulated`` plain ``jnp`` that Pallas'
interpreter runs on a CPU. All other code of the kernel is the same in the three.
"""

import importlib
from types import ModuleType


def choose(kernels: str, *, emulate: bool) -> ModuleType:
    """The bodies for ``kernels`` ("hopper" or "portable"), or those of the interpreter."""
    name = "emulated" if emulate else {"hopper": "sm90", "portable": "sm80"}[kernels]
    return importlib.import_module(f"{__name__}.{name}")

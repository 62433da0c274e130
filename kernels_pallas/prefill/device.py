"""Whether this process' device runs Hopper kernels."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require_hopper(interpret: Any = None) -> None:
    """Raises NotImplementedError unless JAX is 0.11 and its default device an NVIDIA Hopper GPU.

    Args:
      interpret: parameters of Pallas' interpreter, which needs no GPU; or None.
    """
    if interpret is not None:
        return
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"Hopper kernels need JAX 0.11, and this is {jax.__version__}")
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability != "9.0":
        found = device.device_kind if capability is None else f"{device.device_kind}, {capability}"
        raise NotImplementedError(f"Hopper kernels need a GPU of compute capability 9.0, and this is {found}")


def require_16_bits(compute_dtype: np.dtype) -> None:
    """Raises NotImplementedError for float32 operands, which tensor cores do not take."""
    if compute_dtype != jnp.bfloat16:
        raise NotImplementedError(f"Hopper kernels round operands to 16 bits, not {np.dtype(compute_dtype)}")


def on_hopper(module: str, function: str) -> Callable[..., Any]:
    """An op's implementation that is imported where it can run: Mosaic GPU needs a recent JAX and time.

    Args:
      module: the op's name, whose ``pallas_sm90`` holds the function.
      function: the function's name.
    """

    def candidate(*args: Any, **kwargs: Any) -> Any:
        require_hopper()
        implementation = importlib.import_module(f"kernels_pallas.{module}.pallas_sm90")
        return getattr(implementation, function)(*args, **kwargs)

    return candidate

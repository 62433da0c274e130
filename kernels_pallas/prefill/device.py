"""Whether this process' device runs Hopper kernels."""

import importlib
from dataclasses import dataclass
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


@dataclass(frozen=True)
class OnHopper:
    """An op's implementation that is imported where it can run: Mosaic GPU needs a recent JAX and time.

    Attributes:
      op: the op's name; its ``pallas_sm90`` holds a function of the same name.
    """

    op: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        require_hopper()
        implementation = importlib.import_module(f"kernels_pallas.{self.op}.pallas_sm90")
        return getattr(implementation, self.op)(*args, **kwargs)

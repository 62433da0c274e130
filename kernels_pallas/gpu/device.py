"""Whether this process' device runs Hopper kernels."""

import functools
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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


def require_ampere(interpret: Any = None) -> None:
    """Raises NotImplementedError unless JAX is 0.11 and its default device an NVIDIA GPU from Ampere on."""
    if interpret is not None:
        return
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the GPU kernels need JAX 0.11, and this is {jax.__version__}")
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    major = capability.partition(".")[0]
    if device.platform != "gpu" or not major.isdigit() or int(major) < 8:
        found = f"{device.device_kind} {capability}".strip()
        raise NotImplementedError(f"the kernels need compute capability 8.0 or later, and this is {found}")


WITHOUT_A_GPU = 4
"""Multiprocessors that the interpreter is assumed to have."""


def multiprocessors() -> int:
    """How many multiprocessors the device has that kernels are made for.

    That is the device which the current mesh names (compiling for one that is not there), else JAX's default
    device. A slice of a GPU (MIG) counts its own.
    """
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None and named.num_cores:
        return named.num_cores
    return getattr(jax.devices()[0], "core_count", WITHOUT_A_GPU)


def require_16_bits(compute_dtype: np.dtype) -> None:
    """Raises NotImplementedError for float32 operands, which tensor cores do not take."""
    if compute_dtype != jnp.bfloat16:
        raise NotImplementedError(f"Hopper kernels round operands to 16 bits, not {np.dtype(compute_dtype)}")


def import_kernels(module: str) -> ModuleType:
    """``kernels_pallas.<module>``, imported where it can run: kernels need a recent JAX, and time.

    Raises:
      NotImplementedError: this JAX lacks a part of Pallas.
    """
    ask_ptxas_once()
    try:
        return importlib.import_module(f"qwen3_moe_jax.kernels_pallas.{module}")
    except ImportError as error:
        raise NotImplementedError(f"this JAX lacks a part of Pallas: {error}") from error


def ask_ptxas_once() -> None:
    """Keeps the answer of ptxas to what its version is.

    JAX 0.11 starts ptxas for it at each conversion to or from 8 bits or fewer, comparisons among them: a
    hundred times in the decode kernel, half of the time of its lowering, with the interpreter's lock
    held. Nothing changes in a JAX without that function.
    """
    try:
        bindings = importlib.import_module("jax._src.lib.mosaic_gpu")._mosaic_gpu_ext
        ask = bindings._get_ptxas_isa_version
    except (ImportError, AttributeError):
        return
    if not hasattr(ask, "cache_info"):
        bindings._get_ptxas_isa_version = functools.cache(ask)


RUNTIME_VARIABLE = "MOSAIC_GPU_RUNTIME_LIB_PATH"


def tell_runtime() -> bool:
    """Lets programs with kernels be loaded that were compiled before, without the import of Mosaic.

    XLA finds the library that launches kernels by an environment variable, which the import of Mosaic sets
    (JAX 0.11.2, ``jax/experimental/mosaic/gpu/core.py``).

    Returns:
      Whether the library is there; else Mosaic has to be imported.
    """
    try:
        bindings = importlib.import_module("jax._src.lib.mosaic_gpu")._mosaic_gpu_ext
        library = Path(bindings.__file__).with_name("libmosaic_gpu_runtime.so")
    except (ImportError, AttributeError):
        return False
    if not library.exists():
        return False
    os.environ.setdefault(RUNTIME_VARIABLE, str(library))
    return True


@dataclass(frozen=True)
class FromAmpereOn:
    """An op's implementation for NVIDIA GPUs from Ampere on.

    Attributes:
      op: the op's name.
      module: of the op, holds a function of that name; ``kernel_sm90`` takes the portable product.
    """

    op: str
    module: str = "kernel_sm90"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        require_ampere()
        if self.module == "kernel_sm90":
            kwargs["product"] = import_kernels("gpu.products").PORTABLE
        return getattr(import_kernels(f"{self.op}.{self.module}"), self.op)(*args, **kwargs)


@dataclass(frozen=True)
class OnHopper:
    """An op's implementation for Hopper GPUs.

    Attributes:
      op: the op's name; its module ``kernel_sm90`` holds a function of that name.
    """

    op: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        require_hopper()
        return getattr(import_kernels(f"{self.op}.kernel_sm90"), self.op)(*args, **kwargs)

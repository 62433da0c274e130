"""What NVIDIA's driver tells of cards and their memory, without a package of its own.

https://docs.nvidia.com/cuda/cuda-driver-api: cuMemGetInfo, in the device's primary context, which
JAX has made already and which is given back here; cuDeviceCanAccessPeer.
"""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def start_driver(library: Any = None) -> bool:
    """Initializes NVIDIA's driver in this process; says whether it could.

    JAX does it, too, and then finds it done. It takes some tenths of a second without the interpreter's
    lock: time to import JAX in.
    """
    try:
        return not (library or ctypes.CDLL(LIBRARY)).cuInit(0)
    except (OSError, AttributeError):
        return False


def free_on_card(ordinal: int | None, library: Any = None) -> int | None:
    """Bytes of a card that no program holds; of a MIG slice, if the ordinal is one.

    Args:
      ordinal: CUDA's number of the device (``jax.Device.local_hardware_id``).
      library: the driver's library; None loads it.

    Returns:
      None where there is no driver, or it does not answer.
    """
    if ordinal is None:
        return None
    try:
        cuda = library or ctypes.CDLL(LIBRARY)
        return _free(cuda, ordinal)
    except (OSError, AttributeError):
        return None


def without_peer_access(ordinals: Sequence[int | None], library: Any = None) -> tuple[int, int] | None:
    """Two cards of these of which one cannot write into the other's memory, or None.

    Args:
      ordinals: CUDA's numbers of the devices (``jax.Device.local_hardware_id``).
      library: the driver's library; None loads it.

    Returns:
      The first two also where the driver does not answer: nothing is known then.
    """
    known = [ordinal for ordinal in ordinals if ordinal is not None]
    pairs = [(one, other) for one in known for other in known if one != other]
    try:
        cuda = library or ctypes.CDLL(LIBRARY)
        if cuda.cuInit(0):
            return pairs[0] if pairs else None
        return next((pair for pair in pairs if not _has_access(cuda, *pair)), None)
    except (OSError, AttributeError):
        return pairs[0] if pairs else None


def _has_access(cuda: Any, one: int, other: int) -> bool:
    devices = ctypes.c_int(), ctypes.c_int()
    for device, ordinal in zip(devices, (one, other), strict=True):
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal):
            return False
    can = ctypes.c_int()
    return not cuda.cuDeviceCanAccessPeer(ctypes.byref(can), *devices) and bool(can.value)


def _free(cuda: Any, ordinal: int) -> int | None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), ordinal):
        return None
    if cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if cuda.cuCtxPushCurrent_v2(context):
            return None
        failed = cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context))
        return None if failed else free.value
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(device)

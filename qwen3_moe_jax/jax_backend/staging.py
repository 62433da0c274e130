"""Memory of the host from which a GPU fetches by itself.

XLA copies what is sent to a GPU into memory that the card knows, and the card fetches it from there, unless
it is of such memory already: then the bytes of a file are touched once by a processor and not twice.
"""

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType

import jax
import numpy as np

from qwen3_moe_jax.convert.unpack import aligned_empty
from qwen3_moe_jax.jax_backend.device import Device


class Staging:
    """One buffer for each thread that asks; a context that makes them unknown to the card again.

    What is sent from a buffer has to have arrived before the thread writes to it again, and before the end.
    """

    def __init__(self, device: Device, nbytes: int):
        """``nbytes``: of each buffer."""
        self._nbytes = nbytes
        self._local = threading.local()
        client = getattr(device, "client", None) if device.platform == "gpu" else None
        self._map: Callable[[int, int], None] | None = getattr(client, "dma_map", None)
        self._unmap: Callable[[int], None] | None = getattr(client, "dma_unmap", None)
        self._known: list[np.ndarray] = []

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._known and self._unmap is not None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the card is gone, and its memory with it
                self._unmap(self._known.pop().ctypes.data)

    def buffer(self) -> np.ndarray:
        """This thread's: uint8 [nbytes]."""
        found = getattr(self._local, "buffer", None)
        if found is None:
            found = self._local.buffer = aligned_empty((self._nbytes,), np.uint8)
            self._tell(found)
        return found

    def _tell(self, buffer: np.ndarray) -> None:
        """Makes it known to the card; where that cannot be, XLA copies as it does by itself."""
        if self._map is None or self._unmap is None:
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._map(buffer.ctypes.data, buffer.nbytes)
            self._known.append(buffer)

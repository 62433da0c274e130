"""Buffers that the host sees: shared memory that it writes, and what it reads back."""

from typing import Any

import numpy as np


class Shared:
    """A buffer that is mapped into the host's memory whenever the device is not to copy from it.

    Attributes:
      buffer: of wgpu.
      bytes: uint8, the whole of it while it is mapped. Reading them can be very slow.
    """

    def __init__(self, buffer: Any):
        self.buffer = buffer
        self.bytes = self._mapped()
        self._pending: Any = None

    def _mapped(self) -> np.ndarray:
        # Not its write_mapped: that copies with the interpreter's lock held.
        return np.frombuffer(self.buffer._experimental_get_mapped_range(), np.uint8)

    def unmap(self) -> None:
        """Gives it to the device; what is still written to ``bytes`` is lost, or a fault."""
        self.bytes = np.empty(0, np.uint8)
        self.buffer.unmap()

    def start(self) -> None:
        """Asks for it back; called right after the submit."""
        self._pending = self.buffer.map_async("WRITE")

    def wait(self) -> None:
        """Until it is mapped."""
        if self._pending is not None:
            self._pending.sync_wait()
            self._pending = None
            self.bytes = self._mapped()


class Readback:
    """The start of a buffer, copied at the end of one submit and readable when that is done."""

    def __init__(self, source: Any, staging: Any):
        self.source = source
        self.staging = staging
        self._pending: Any = None

    def start(self) -> None:
        """Asks for the copy; called right after the submit."""
        self._pending = self.staging.map_async("READ")

    def wait(self) -> np.ndarray:
        """The bytes, uint8, when the submit is done."""
        self._pending.sync_wait()
        data = np.frombuffer(self.staging.read_mapped(), np.uint8).copy()
        self.staging.unmap()
        return data

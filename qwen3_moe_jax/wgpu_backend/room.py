"""Several tensors in one buffer.

wgpu takes the device's memory in blocks of up to 256 MiB and puts smaller buffers into them. Experts of 113
and 165 MB leave a fifth of such blocks empty. A larger buffer gets a block of its own size, so the tensors of
a layer share one.
"""

from typing import Any

from qwen3_moe_jax.wgpu_backend.device import Device

ALIGNMENT = 256
"""What every adapter accepts as the offset of a binding."""

SLACK = 64 << 10
"""Bytes for the ends of windows."""

Window = tuple[Any, int, int]
"""A buffer, where the window begins in it, and its bytes."""


class Room:
    """A buffer that is handed out from its start; what it has no place for gets a buffer of its own."""

    def __init__(self, device: Device, nbytes: int, label: str):
        """Args: nbytes, of all that it shall hold; where no buffer can be so large there is none to share."""
        self._device = device
        self._size = nbytes + SLACK
        fits = self._size <= device.max_buffer_bytes
        self._buffer = device.buffer(self._size, label) if fits else None
        self._end = 0

    def window(self, nbytes: int, label: str) -> Window:
        """A part of at least ``nbytes``.

        Raises:
          MemoryPlanError: the device has no memory for a buffer of its own.
        """
        size = max(16, -(-nbytes // 16) * 16)
        if self._buffer is None or self._end + size > self._size:
            return self._device.buffer(nbytes, label), 0, size
        begin = self._end
        self._end += -(-size // ALIGNMENT) * ALIGNMENT
        return self._buffer, begin, size

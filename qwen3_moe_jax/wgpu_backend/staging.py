"""Large uploads: memory that host and device share, filled by threads of the host and copied by the device.

``queue.write_buffer`` allocates staging memory anew for each call, and the calling thread alone copies into
it. Here a few buffers stay for a whole load: a thread takes one, fills it, sends it, and it is free again
when the device has copied it.
"""

from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

from qwen3_moe_jax.wgpu_backend.device import Device, Launch, Shared

Copy = tuple[int, Any, int, int]
"""From this byte of the shared memory on, to a buffer, at its byte, so many bytes: multiples of 4."""


class Staging:
    """Pieces of shared memory, for any number of threads. A context manager: on exit all have been copied."""

    def __init__(self, device: Device, count: int, nbytes: int):
        """Args: count, pieces; nbytes, of each."""
        self._device = device
        self._pieces = [device.shared(nbytes) for _ in range(count)]
        self._free: SimpleQueue[Shared] = SimpleQueue()
        for piece in self._pieces:
            self._free.put(piece)

    def take(self) -> Shared:
        """A piece that can be filled; waits until there is one."""
        piece = self._free.get()
        piece.wait()
        return piece

    def give_back(self, piece: Shared) -> None:
        """For a piece that was taken and is not sent."""
        self._free.put(piece)

    def send(self, piece: Shared, copies: Sequence[Copy], launches: Sequence[Launch] = ()) -> None:
        """Submits copies out of a piece and then launches, as one: no other thread's work comes between."""
        self._device.send(piece, copies, launches)
        self._free.put(piece)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for piece in self._pieces:  # a buffer must not go while wgpu is about to map it
            piece.wait()

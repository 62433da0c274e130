"""Blocks of a file put in the device's order by the device: the host reads them and sends them, no more.

The words of most types are the bytes of ggml's blocks in another order (``layout.byte_order``). A piece is
copied to one buffer as it is, and a kernel writes its words where they belong. One submit holds both, and
submits are done in turn, so that one buffer is enough for any number of threads.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.wgpu_backend.device import Device, Launch, Shared
from qwen3_moe_jax.wgpu_backend.layout import byte_order
from qwen3_moe_jax.wgpu_backend.room import ALIGNMENT
from qwen3_moe_jax.wgpu_backend.staging import Copy

WORKGROUP = 256
PARAMS_NBYTES = 16
"""Behind the blocks, in the same shared memory, the kernel's parameters go."""


def can_reorder(type: GGMLType) -> bool:
    """Whether the words of a type are the bytes of its blocks in another order."""
    return byte_order(type) is not None


class Reorder:
    """One device's buffer of raw blocks, and the orders of types."""

    def __init__(self, device: Device):
        self._device = device
        self._kernel = device.kernel("reorder", WG=WORKGROUP)
        self._params = device.buffer(PARAMS_NBYTES, "reorder", uniform=True)
        self._raw: Any = None
        self._orders: dict[GGMLType, Any] = {}

    def prepare(self, types: Collection[GGMLType], nbytes: int) -> None:
        """Makes what pieces of these types of at most so many bytes need; before any thread sends one."""
        self._raw = self._device.buffer(nbytes, "blocks")
        for type in types:
            order = byte_order(type)
            if order is not None:
                self._orders[type] = self._device.upload(order, f"order of {type.name}")

    def orders(
        self, type: GGMLType, piece: Shared, nbytes: int, target: Any, offset: int
    ) -> tuple[list[Copy], list[Launch]]:
        """What puts whole groups of blocks into a buffer; for ``Staging.send``.

        Args:
          type: of the blocks.
          piece: shared memory that begins with the blocks, as a file has them, and ends with PARAMS_NBYTES of
            room.
          nbytes: of the blocks, with zeros up to the end of the last group.
          target: a buffer of the device.
          offset: in it, in bytes: a multiple of 4.
        """
        order, words = self._orders[type], nbytes // 4
        at = piece.bytes.size - PARAMS_NBYTES
        begin = offset // ALIGNMENT * ALIGNMENT  # a binding may not show all of a buffer that tensors share
        piece.bytes[at:].view(np.uint32)[:3] = words, (offset - begin) // 4, order.size // 4
        copies = [(0, self._raw, 0, nbytes), (at, self._params, 0, PARAMS_NBYTES)]
        window = target, begin, offset - begin + nbytes
        dispatch = self._device.bind(self._kernel, {0: self._params, 1: self._raw, 2: order, 3: window})
        return copies, [(dispatch, -(-words // WORKGROUP), 1, 1)]

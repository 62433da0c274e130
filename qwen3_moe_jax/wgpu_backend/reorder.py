"""Blocks of a file put in the device's order by the device: the host reads them and writes them, no more.

The words of most types are the bytes of ggml's blocks in another order (``layout.byte_order``). A piece is
written to one buffer as it is, and a kernel writes its words where they belong. The queue keeps writes and
kernels in their order, so that one buffer is enough.
"""

from typing import Any

import numpy as np

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.wgpu_backend.device import Device
from qwen3_moe_jax.wgpu_backend.layout import byte_order

WORKGROUP = 256


def can_reorder(type: GGMLType) -> bool:
    """Whether the words of a type are the bytes of its blocks in another order."""
    return byte_order(type) is not None


class Reorder:
    """One device's buffer of raw blocks, and the orders of the types that have been met."""

    def __init__(self, device: Device):
        self._device = device
        self._kernel = device.kernel("reorder", WG=WORKGROUP)
        self._params = device.buffer(12, "reorder", uniform=True)
        self._raw: Any = None
        self._orders: dict[GGMLType, Any] = {}

    def write(self, type: GGMLType, blocks: np.ndarray, target: Any, offset: int) -> None:
        """Puts whole groups of blocks into a buffer.

        Args:
          blocks: uint8, as a file has them, with zeros up to the end of the last group.
          target: a buffer of the device.
          offset: in it, in bytes: a multiple of 4.
        """
        device, order = self._device, byte_order(type)
        assert order is not None
        if type not in self._orders:
            self._orders[type] = device.upload(order, f"order of {type.name}")
        if self._raw is None or self._raw.size < blocks.size:
            self._raw = device.buffer(blocks.size, "blocks")
        words = blocks.size // 4
        device.write(self._raw, blocks)
        device.write(self._params, np.array([words, offset // 4, order.size], np.uint32))
        resources = {0: self._params, 1: self._raw, 2: self._orders[type], 3: target}
        device.run([(device.bind(self._kernel, resources), -(-words // WORKGROUP), 1, 1)])

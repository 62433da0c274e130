"""One token on several devices of a host: where their partial sums lie, and whose experts are computed where.

Each device has some of the heads, and its own experts (``ep``) or its part of every expert's width (``tp``).
What it has of the output projection and of down is a partial sum: its blocks write it into the state of every
device, signal to every device, and wait for the signals of all. Every device then adds the same parts in the
same order, that of the devices, so that all have the same bits, always. Norms and the router are computed by
every device.
"""

from dataclasses import replace
from typing import Any, NamedTuple

DEVICE_AXES = ("ep", "tp")
"""The axes of the mesh, in whose order devices are numbered; ``ep`` splits the experts."""


class Split(NamedTuple):
    """The sizes of the mesh's axes.

    Attributes:
      ep: groups of devices that have different experts.
      tp: devices of a group, each with a part of every expert's width.
    """

    ep: int = 1
    tp: int = 1

    @property
    def devices(self) -> int:
        return self.ep * self.tp

    def part_of(self, config: Any, vocab_size: int) -> Any:
        """The model's config with the sizes that one device has; it still counts all experts."""
        if self.devices == 1:
            return config
        return replace(
            config,
            num_attention_heads=config.num_attention_heads // self.devices,
            num_key_value_heads=max(config.num_key_value_heads // self.devices, 1),
            moe_intermediate_size=config.moe_intermediate_size // self.tp,
            vocab_size=vocab_size,
        )


ONE_DEVICE = Split()


class Slots(NamedTuple):
    """Places of the first axis of the state: 0 is the residual stream, the others are added to it.

    Down's parts have one place each: who writes them has waited for the output projection of all devices,
    which is behind their last reader. A part of the output projection is read until that of the next layer
    is written, so there are two sets of them, by turns. One device adds its own to the residual stream.

    Attributes:
      devices: that decode together.
      down_parts: of each of them.
    """

    devices: int
    down_parts: int

    @property
    def number(self) -> int:
        """All places."""
        outputs = 2 * self.devices if self.devices > 1 else 0
        return 1 + self.devices * self.down_parts + outputs

    def down(self, device: Any, part: Any) -> Any:
        """That of a device's part of down."""
        return 1 + device * self.down_parts + part

    def output(self, device: Any, layer: Any) -> Any:
        """That of a device's part of a layer's output projection."""
        return 1 + self.devices * (self.down_parts + layer % 2) + device

    @property
    def sent(self) -> list[list[int]]:
        """The places that each device fills."""
        every = range(self.devices)
        outputs = [[self.output(device, turn) for turn in range(2)] for device in every]
        return [outputs[d] + [self.down(d, part) for part in range(self.down_parts)] for d in every]

    def after_output(self, layer: Any) -> list:
        """What the residual stream is the sum of, in this order, after a layer's output projection."""
        return [0, *(self.output(device, layer) for device in range(self.devices) if self.devices > 1)]

    def before(self, layer: Any) -> list:
        """Likewise before a layer, after down of the layer before it, whose turn is that of the next."""
        outputs = [self.output(device, layer + 1) for device in range(self.devices) if self.devices > 1]
        return [0, *outputs, *range(1, 1 + self.devices * self.down_parts)]

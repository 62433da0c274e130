"""The work space on the device, and where the stages of a pass can be read in it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.rope import rope_tables
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import StageKey
from qwen3_moe_jax.wgpu_backend.device import Device
from qwen3_moe_jax.wgpu_backend.plan import Workspace
from qwen3_moe_jax.wgpu_backend.room import ALIGNMENT

EMITTED_WORD = 4
"""Index of ``emitted`` in ``Step`` of common.wgsl."""


def step_words(
    position: int = 0, tokens: int = 1, head_row: int = 0, *, replay: bool = False, record: bool = False
) -> np.ndarray:
    """``Step`` of common.wgsl before a pass: uint32 [8], padded."""
    return np.asarray([position, tokens, head_row, replay, 0, record, 0, 0], np.uint32)


def sampling_words(sampling: Sampling, vocab_size: int) -> np.ndarray:
    """``Choice`` of sample.wgsl: uint32 [8]."""
    ints = np.asarray([vocab_size, sampling.top_k, sampling.seed], np.uint32)
    floats = (
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
    )
    return np.concatenate([ints, np.asarray(floats, np.float32).view(np.uint32)])


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a stage can be read: floats ``[T, *shape]`` at an offset of a buffer, then a part of them."""

    key: StageKey
    buffer: Any
    shape: tuple[int, ...]
    part: slice | None = None
    dtype: Any = np.float32
    offset: int = 0

    def read(self, device: Device, tokens: int) -> np.ndarray:
        count = tokens * int(np.prod(self.shape))
        whole = device.read(self.buffer, self.dtype, count, self.offset).reshape(tokens, *self.shape)
        return whole if self.part is None else np.ascontiguousarray(whole[:, self.part])


class Buffers:
    """The work space on the device, by name; ``keys`` and ``values`` are lists, one per layer."""

    def __init__(self, device: Device, config: Qwen3MoeConfig, workspace: Workspace, max_context: int):
        self.workspace = workspace
        layers = config.num_hidden_layers
        self._layer_ids = -(-4 * workspace.chunk * config.num_experts_per_tok // ALIGNMENT) * ALIGNMENT
        sizes = dict(workspace.nbytes)
        sizes["ids"] = sizes["replay"] = self._layer_ids * layers
        key_bytes, value_bytes = sizes.pop("keys"), sizes.pop("values")
        sizes["emitted"] = 4 * device.tuning.tokens_per_submit
        self.named = {name: device.buffer(size, name) for name, size in sizes.items()}
        self.keys = [device.buffer(key_bytes, f"keys of layer {i}") for i in range(layers)]
        self.values = [device.buffer(value_bytes, f"values of layer {i}") for i in range(layers)]
        self.step = device.buffer(step_words().nbytes, "step", uniform=True)
        cos, sin = rope_tables(config, max_context)
        device.write(self.named["rope_table"], np.concatenate([cos, sin], axis=1))

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def of_layer(self, name: str, layer: int) -> tuple[Any, int, int]:
        """The part of "ids" or "replay" that is one layer's."""
        return self.named[name], layer * self._layer_ids, self._layer_ids

    def layer_offset(self, layer: int) -> int:
        """Where a layer's part of "ids" or "replay" starts, in bytes."""
        return layer * self._layer_ids

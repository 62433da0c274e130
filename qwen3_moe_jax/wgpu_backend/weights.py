"""A model's tensors on the device: in one buffer each, or in as many as the adapter's bindings ask for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import BlockSource, ModelSource
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.core.errors import BackendUnavailableError, MemoryPlanError
from qwen3_moe_jax.wgpu_backend.device import UPLOAD_PIECE, Device
from qwen3_moe_jax.wgpu_backend.feed import Rows, write_all
from qwen3_moe_jax.wgpu_backend.kernels import DenseBuffer, ExpertBuffer, Segment
from qwen3_moe_jax.wgpu_backend.layout import (
    WORD_FORMATS,
    device_nbytes,
    device_words,
    granule,
    items_per_window,
)
from qwen3_moe_jax.wgpu_backend.reorder import Reorder
from qwen3_moe_jax.wgpu_backend.room import Room, Window

MAX_ROWS = 65535 * 8
"""Rows of one dispatch: a grid has at most 65,535 workgroups per dimension, of at least 8 rows each."""

SMALLEST_MULTIPLE = 8
"""Every width of the model must be a multiple of this: kernels read vectors of four, two at a time."""


@dataclass(frozen=True, eq=False)
class LayerBuffers:
    """One decoder layer. ``qkv`` is one buffer of three matrices where a binding can show them together."""

    input_layernorm: object
    head_norms: object
    post_attention_layernorm: object
    qkv: list[DenseBuffer]
    o_proj: list[DenseBuffer]
    router: list[DenseBuffer]
    gate_up: list[tuple[ExpertBuffer, ExpertBuffer]]
    down: list[ExpertBuffer]


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """All of a model; ``embed_tokens`` are windows of rows, and with a tied output also ``lm_head``."""

    embed_tokens: list[ExpertBuffer]
    layers: list[LayerBuffers]
    norm: object
    lm_head: list[DenseBuffer]


def check_shapes(config: Qwen3MoeConfig, types: Mapping[str, GGMLType]) -> None:
    """Refuses what the kernels cannot read.

    Raises:
      BackendUnavailableError: a width that vectors of weights do not divide.
    """
    for spec in tensor_specs(config):
        if len(spec.shape) == 1:
            continue
        needed = max(SMALLEST_MULTIPLE, WORD_FORMATS[types[spec.path]].block)
        if spec.shape[-1] % needed:
            raise BackendUnavailableError(
                f"{spec.path} has rows of {spec.shape[-1]} weights, and the wgpu backend reads "
                f"{types[spec.path].name} in multiples of {needed}: use another backend"
            )
    if config.head_dim % SMALLEST_MULTIPLE:
        raise BackendUnavailableError(
            f"head_dim is {config.head_dim}; the wgpu backend needs a multiple of 8"
        )


def weight_nbytes(config: Qwen3MoeConfig, types: Mapping[str, GGMLType]) -> int:
    """Device bytes of all weights."""
    total = 0
    for spec in tensor_specs(config):
        count = int(np.prod(spec.shape))
        total += 4 * count if len(spec.shape) == 1 else device_nbytes(types[spec.path], count)
    return total


class Upload:
    """Buffers for every tensor of a source: made at once, filled by ``fill``.

    Attributes:
      weights: the buffers; kernels can be bound to them before they are filled.
    """

    def __init__(self, device: Device, source: ModelSource, progress: ProgressCallback | None = None):
        """Makes the buffers.

        Raises:
          MemoryPlanError: a tensor does not fit the device.
        """
        self._device = device
        self._source = source
        self._progress = progress
        self._done = 0
        self._wanted: list[Rows] = []
        # Before any other kernel: the first pieces need it.
        by_device = isinstance(source, BlockSource) and not device.report.software
        self._reorder = Reorder(device) if by_device else None
        self.weights = self._model()

    def fill(self) -> None:
        """Reads every tensor into its buffers, pieces of them side by side.

        Raises:
          ModelFileError: as ``source.tensor``.
        """
        self._write_wanted()
        self._device.flush()

    def _model(self) -> ModelWeights:
        config = self._source.config
        self._room = self._room_of("embed_tokens", "lm_head")
        embed = self._stack("embed_tokens", config.vocab_size, 1, max_items=MAX_ROWS)
        if config.tie_word_embeddings:
            head = [
                DenseBuffer(w.buffer, (Segment(w.type, w.end - w.begin, w.columns, 0, w.begin),))
                for w in embed
            ]
        else:
            head = self._dense("lm_head")
        layers = [self._layer(f"layers.{i}") for i in range(config.num_hidden_layers)]
        norm = self._norms("norm")
        return ModelWeights(embed, layers, norm, head)

    def _layer(self, prefix: str) -> LayerBuffers:
        attention, experts = f"{prefix}.self_attn", f"{prefix}.mlp.experts"
        self._room = self._room_of(f"{prefix}.")
        return LayerBuffers(
            self._norms(f"{prefix}.input_layernorm"),
            self._norms(f"{attention}.q_norm", f"{attention}.k_norm"),
            self._norms(f"{prefix}.post_attention_layernorm"),
            self._dense(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            self._dense(f"{attention}.o_proj"),
            self._dense(f"{prefix}.mlp.router"),
            self._gate_up(f"{experts}.gate_proj", f"{experts}.up_proj"),
            self._experts(f"{experts}.down_proj"),
        )

    def _room_of(self, *prefixes: str) -> Room:
        """Place for the matrices whose paths begin so."""
        specs, types = self._source.specs, self._source.types
        wanted = [p for p, s in specs.items() if p.startswith(prefixes) and len(s.shape) > 1]
        nbytes = sum(device_nbytes(types[p], int(np.prod(specs[p].shape))) for p in wanted)
        return Room(self._device, nbytes, prefixes[0])

    def _tensor(self, path: str) -> PackedTensor:
        tensor = self._source.tensor(path)
        self._tell(self._source.tensor_nbytes(path))
        return tensor

    def _norms(self, *paths: str) -> object:
        return self._device.upload(np.concatenate([dequantize(self._tensor(p)) for p in paths]), paths[0])

    def _dense(self, *paths: str) -> list[DenseBuffer]:
        """Matrices side by side: in one buffer if that fits, else each in its own windows."""
        specs, types = self._source.specs, self._source.types
        sizes = [device_nbytes(types[p], int(np.prod(specs[p].shape))) for p in paths]
        if sum(sizes) <= self._device.max_bytes and sum(specs[p].shape[0] for p in paths) <= MAX_ROWS:
            return [self._side_by_side(paths, sizes)]
        buffers, y = [], 0
        for path in paths:
            rows = specs[path].shape[0]
            for window in self._stack(path, rows, 1, max_items=MAX_ROWS):
                segment = Segment(window.type, window.end - window.begin, window.columns, 0, y + window.begin)
                buffers.append(DenseBuffer(window.buffer, (segment,)))
            y += rows
        return buffers

    def _side_by_side(self, paths: Sequence[str], sizes: Sequence[int]) -> DenseBuffer:
        window = self._room.window(sum(sizes), paths[0])
        segments, at, y = [], 0, 0
        for path, size in zip(paths, sizes, strict=True):
            rows, columns = self._source.specs[path].shape
            self._write(path, 0, rows, window, at)
            segments.append(Segment(self._source.types[path], rows, columns, at // 16, y))
            at += size
            y += rows
        return DenseBuffer(window, tuple(segments))

    def _experts(self, path: str, stride: int = 1, max_items: int = MAX_ROWS) -> list[ExpertBuffer]:
        experts, rows, _ = self._source.specs[path].shape
        return self._stack(path, experts, rows, stride=stride, max_items=max_items)

    def _gate_up(self, gate: str, up: str) -> list[tuple[ExpertBuffer, ExpertBuffer]]:
        """Both stacks, cut at the same experts."""
        specs, types = self._source.specs, self._source.types
        experts, rows, columns = specs[gate].shape
        stride = max(granule(types[p], rows * columns) for p in (gate, up))
        count = min(self._fit(p, types[p], experts, rows * columns, MAX_ROWS, stride) for p in (gate, up))
        pairs = zip(self._experts(gate, stride, count), self._experts(up, stride, count), strict=True)
        return list(pairs)

    def _fit(self, path: str, type: GGMLType, items: int, weights: int, max_items: int, stride: int) -> int:
        try:
            return items_per_window(type, items, weights, self._device.max_bytes, max_items, stride)
        except ValueError as error:
            raise MemoryPlanError(f"{path} does not fit {self._device.report.name}: {error}") from error

    def _stack(
        self, path: str, items: int, rows: int, *, max_items: int, stride: int = 1
    ) -> list[ExpertBuffer]:
        """A tensor as windows of whole items of ``rows`` rows."""
        type = self._source.types[path]
        columns = self._source.specs[path].shape[-1]
        count = self._fit(path, type, items, rows * columns, max_items, stride)
        found = []
        for begin in range(0, items, count):
            end = min(begin + count, items)
            window = self._room.window(device_nbytes(type, (end - begin) * rows * columns), path)
            self._write(path, begin * rows, (end - begin) * rows, window, 0)
            found.append(ExpertBuffer(window, type, begin, end, rows, columns))
        return found

    def _write(self, path: str, first: int, count: int, window: Window, offset: int) -> None:
        buffer, begin, _ = window
        self._wanted.append(Rows(path, first, count, buffer, begin + offset))

    def _write_wanted(self) -> None:
        if isinstance(self._source, BlockSource):
            for nbytes in write_all(self._device, self._source, self._wanted, self._reorder):
                self._tell(nbytes)
            return
        for path, parts in groupby(self._wanted, lambda rows: rows.path):
            tensor = _as_rows(self._tensor(path))
            for part in parts:
                rows = tensor[part.first : part.first + part.count]
                write_rows(self._device, part.buffer, rows, part.offset)

    def _tell(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self._source.nbytes)


def write_rows(device: Device, buffer: object, tensor: PackedTensor, offset: int) -> None:
    """Copies packed rows into a buffer in pieces of about ``UPLOAD_PIECE`` bytes."""
    for part in _row_pieces(tensor):
        words = device_words(part)
        device.write(buffer, words, offset)
        device.flush()
        offset += len(words)


def _as_rows(tensor: PackedTensor) -> PackedTensor:
    """The experts' matrices as rows one after the other."""
    arrays = {name: a.reshape(-1, a.shape[-1]) for name, a in tensor.arrays.items()}
    return PackedTensor(arrays, tensor.type, tensor.layout)


def _row_pieces(tensor: PackedTensor) -> Iterator[PackedTensor]:
    flat = _as_rows(tensor)
    rows, columns = flat.shape
    stride = granule(tensor.type, columns)
    count = max(1, UPLOAD_PIECE // device_nbytes(tensor.type, stride * columns)) * stride
    for begin in range(0, rows, count):
        yield flat[begin : begin + count]

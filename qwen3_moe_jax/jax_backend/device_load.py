"""Weights to a GPU as the file has them: read in threads, unpacked, checked and shuffled on the device.

The host touches each byte once, when the system copies it out of the page cache. Threads read pieces of whole
rows into a few buffers of their own and send them up, with the interpreter's lock free; a program for each
type and shape unpacks a piece, looks for NaN and infinity, makes tiles and writes them into a stack that
was allocated first. Results are bit for bit those of ``convert.unpack`` and ``convert.layouts.gpu_tiles``.

===========================  ==================================================================
bound                        bytes
===========================  ==================================================================
host                         READERS buffers of PIECE_BYTES; of a checkpoint, TENSOR_BYTES
device, beyond the weights   READERS + 2 AHEAD raw pieces, and one piece unpacked and in tiles
===========================  ==================================================================
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.formats import SCALE_NAMES
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS, to_gpu_tiles
from qwen3_moe_jax.convert.packed import ARRAY_FORMATS, PackedTensor
from qwen3_moe_jax.convert.source import BlockSource, ModelSource, nonfinite_error
from qwen3_moe_jax.convert.unpack import Nonfinite
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.programs import Program
from qwen3_moe_jax.jax_backend.staging import Staging
from qwen3_moe_jax.jax_backend.wanted import Wanted
from qwen3_moe_jax.kernels_pallas.packed.stacks import abstract_packed, rows_per_unit
from qwen3_moe_jax.kernels_pallas.packed.unpack import first_nonfinite, unpack_blocks, unpacks

PIECE_BYTES = 32 << 20
"""A piece is at most so large: few enough turns of the interpreter's lock, short beside the plan."""

READERS = 8
"""Threads that read: an H100 was loaded in 1.7 s by 8, in 1.9 s by 4 or 12."""

AHEAD = 2
"""Pieces that have been read and not yet used, and pieces whose programs are under way."""

TENSORS_AHEAD = 2
"""Tensors of a checkpoint that are read beside the one that is sent."""

TENSOR_BYTES = 1 << 30
"""Of all these together, unless a single one has more."""


@dataclass(frozen=True)
class Target:
    """Where a tensor goes.

    Attributes:
      path: of the parameter.
      stack: name of the stack.
      first: its first row there.
      type: its quantization type.
      rows, columns: of the tensor as a matrix, experts one after the other.
      tiled: whether the stack is in tiles.
    """

    path: str
    stack: str
    first: int
    type: GGMLType
    rows: int
    columns: int
    tiled: bool

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row in a file."""
        return BLOCK_FORMATS[self.type].row_nbytes(self.columns)

    @cached_property
    def piece_rows(self) -> int:
        """Rows of a piece, in whole tiles: the most that divide all rows and take at most PIECE_BYTES."""
        unit = TILE_ROWS if self.tiled else 1
        units, maximum = self.rows // unit, max(1, PIECE_BYTES // (unit * self.row_nbytes))
        return unit * next(n for n in range(min(units, maximum), 0, -1) if units % n == 0)

    @property
    def piece_nbytes(self) -> int:
        """Bytes of a piece in a file."""
        return self.piece_rows * self.row_nbytes


def allocate(shapes: Any) -> Any:
    """Zeros of these shapes, made by one program."""
    leaves, tree = jax.tree.flatten(shapes)
    spec = tuple((tuple(leaf.shape), str(jnp.dtype(leaf.dtype))) for leaf in leaves)
    return jax.tree.unflatten(tree, _zeros(spec=spec))


def _zeros_of(spec: tuple[tuple[tuple[int, ...], str], ...]) -> list[jax.Array]:
    return [jnp.zeros(shape, dtype) for shape, dtype in spec]


def _place_blocks(
    stack: PackedTensor, blocks: jax.Array, first: jax.Array, *, rows: int, columns: int, tiled: bool
) -> tuple[PackedTensor, jax.Array]:
    """Unpacks ``rows`` rows of a file into the stack.

    Args:
      blocks: uint8 [bytes].
      first: int32, the first row's place, in units of the stack's layout.

    Returns:
      The stack, and ``first_nonfinite`` of the rows.
    """
    return _place(stack, unpack_blocks(blocks, stack.type, (rows, columns)), first, tiled=tiled)


def _place(
    stack: PackedTensor, value: PackedTensor, first: jax.Array, *, tiled: bool
) -> tuple[PackedTensor, jax.Array]:
    """The same with rows that are unpacked."""
    bad = first_nonfinite(value)
    arranged = to_gpu_tiles(value, jnp) if tiled else value
    put = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, first, 0)
    return jax.tree.map(put, stack, arranged), bad


_zeros = Program(_zeros_of, static_argnames=("spec",))
place_blocks = Program(
    _place_blocks, static_argnames=("rows", "columns", "tiled"), donate_argnames=("stack",)
)
place_rows = Program(_place, static_argnames=("tiled",), donate_argnames=("stack",))


class Checks:
    """What was found of NaN and infinity, in the order of the file; asked for when all is under way."""

    def __init__(self, source: ModelSource):
        self._source = source
        self._found: list[tuple[Target, int, np.ndarray]] = []
        self._under_way: deque[tuple[Target, int, jax.Array]] = deque()

    def add(self, target: Target, first_row: int, bad: jax.Array) -> None:
        """Notes what a piece's program says; waits for the one that was noted ``AHEAD`` pieces before."""
        bad.copy_to_host_async()
        self._under_way.append((target, first_row, bad))
        if len(self._under_way) > AHEAD:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        target, first_row, bad = self._under_way.popleft()
        self._found.append((target, first_row, np.asarray(bad)))

    def raise_first(self) -> None:
        """Raises:
        ModelFileError: ``E_NONFINITE``, with the words of the host's own check.
        """
        while self._under_way:
            self._wait_for_one()
        found, self._found = self._found, []
        by_tensor: dict[str, list[Nonfinite]] = {}
        for target, first_row, bad in found:
            names = [name for name in ARRAY_FORMATS[target.type] if name in SCALE_NAMES]
            before = first_row * target.columns // BLOCK_FORMATS[target.type].weights
            hits = [Nonfinite(n, before + int(b)) for n, b in zip(names, bad, strict=True) if b >= 0]
            by_tensor.setdefault(target.path, []).extend(hits)
        for path, hits in by_tensor.items():
            if hits and self._source.checks:
                spec, kind = self._source.specs[path], self._source.types[path]
                first = min(hits, key=lambda bad: bad.block)
                raise nonfinite_error(spec.gguf_name, kind, spec.shape, first)


def load_stacks(
    source: ModelSource, targets: Sequence[Target], stacks: dict[str, Any], device: Device
) -> Iterator[int]:
    """Fills the stacks; yields bytes of the source that have been read.

    Args:
      source: an open model.
      targets: in the order of the source.
      stacks: by name; replaced, for every step donates the one before.
      device: where they are.

    Raises:
      ModelFileError: as ``source.tensor``.
    """
    checks = Checks(source)
    try:
        if gives_blocks(source):
            yield from _from_blocks(source, targets, stacks, device, checks)
        else:
            yield from _from_tensors(source, targets, stacks, device, checks)
    except ModelFileError:
        checks.raise_first()  # what it finds lies before what has failed now
        raise
    checks.raise_first()


def gives_blocks(source: ModelSource) -> TypeGuard[BlockSource]:
    """Whether this source's tensors go up as blocks; else as packed arrays."""
    return isinstance(source, BlockSource) and all(map(unpacks, source.types.values()))


def wanted_programs(
    source: ModelSource, targets: Sequence[Target], shapes: Mapping[str, PackedTensor]
) -> list[Wanted]:
    """The programs of :func:`load_stacks`, each once. ``shapes``: of the stacks."""
    found: dict[Any, Wanted] = {}
    first = jax.ShapeDtypeStruct((), np.int32)
    for target in targets:
        stack, tiled = shapes[target.stack], target.tiled
        if gives_blocks(source):
            rows = target.piece_rows
            blocks = jax.ShapeDtypeStruct((rows * target.row_nbytes,), np.uint8)
            more = {"blocks": blocks, "rows": rows, "columns": target.columns}
            program = place_blocks
        else:
            more = {"value": abstract_packed(target.type, (target.rows, target.columns))}
            program = place_rows
        arguments = {"stack": stack, "first": first, "tiled": tiled, **more}
        key = target.stack, target.rows
        found.setdefault(key, Wanted(program, arguments, f"loading {target.stack}", 0.1))
    return list(found.values())


def _from_blocks(
    source: BlockSource, targets: Sequence[Target], stacks: dict[str, Any], device: Device, checks: Checks
) -> Iterator[int]:
    pieces = [(t, row) for t in targets for row in range(0, t.rows, t.piece_rows)]

    def read(target: Target, row: int) -> jax.Array:
        piece = staging.buffer()[: target.piece_nbytes]
        source.read_blocks(target.path, row * target.row_nbytes, piece)
        if device.platform == "cpu":  # where the array would be the buffer, whatever ``may_alias`` says
            piece = piece.copy()
        return jax.device_put(piece, device).block_until_ready()

    largest = max((target.piece_nbytes for target in targets), default=0)
    with Staging(device, largest) as staging, ThreadPoolExecutor(READERS, "load") as pool:
        waiting: deque[tuple[Target, int, Future[jax.Array]]] = deque()
        left = iter(pieces)
        try:
            while True:
                while len(waiting) < READERS + AHEAD and (piece := next(left, None)) is not None:
                    waiting.append((*piece, pool.submit(read, *piece)))
                if not waiting:
                    return
                target, row, future = waiting.popleft()
                blocks = future.result()
                first = np.int32((target.first + row) // rows_per_unit(stacks[target.stack].layout))
                stacks[target.stack], bad = place_blocks(
                    stacks[target.stack],
                    blocks,
                    first,
                    rows=target.piece_rows,
                    columns=target.columns,
                    tiled=target.tiled,
                )
                checks.add(target, row, bad)
                yield blocks.nbytes
        finally:
            for _, _, future in waiting:
                future.cancel()


def _from_tensors(
    source: ModelSource, targets: Sequence[Target], stacks: dict[str, Any], device: Device, checks: Checks
) -> Iterator[int]:
    nbytes = lambda target: source.tensor_nbytes(target.path)
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        waiting: deque[tuple[Target, Future[PackedTensor]]] = deque()
        left = deque(targets)
        try:
            while left or waiting:
                while left and len(waiting) <= TENSORS_AHEAD:
                    if waiting and sum(nbytes(t) for t, _ in [*waiting, (left[0], None)]) > TENSOR_BYTES:
                        break
                    target = left.popleft()
                    waiting.append((target, pool.submit(source.unchecked, target.path)))
                target, future = waiting.popleft()
                value = as_rows(future.result())
                sent = jax.device_put(value, device)
                first = np.int32(target.first // rows_per_unit(stacks[target.stack].layout))
                stacks[target.stack], bad = place_rows(stacks[target.stack], sent, first, tiled=target.tiled)
                jax.block_until_ready(sent)
                checks.add(target, 0, bad)
                yield nbytes(target)
                del value, sent, future  # before another is read
        finally:
            for _, future in waiting:
                future.cancel()


def as_rows(value: PackedTensor) -> PackedTensor:
    """The experts' matrices as rows one after the other."""
    return value if value.ndim == 2 else jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), value)

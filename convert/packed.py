"""The packed tensor: quantized weights as plain arrays that carry their own type.

``PackedTensor`` is what the converter makes and what every backend computes
with. Its arrays are a re-arrangement of the bytes of the file: nothing is
rounded, and :func:`qwen3_moe_jax.convert.unpack.dequantize` gives back bit for bit what
ggml's own dequantizer gives.

Arrays of layout ``"rows"`` for a tensor of logical shape ``[..., N, K]`` (a
matrix of N rows and K columns, under any leading axes such as experts):

======  ==========================================================================
type    arrays (name: dtype [shape])
======  ==========================================================================
F32     ``w``: float32 [..., N, K]
F16     ``w``: float16 [..., N, K]
BF16    ``w``: bfloat16 bits as uint16 [..., N, K]
Q8_0    ``q``: int8 [..., N, K], ``d``: float16 [..., N, K/32]
Q4_K    ``q``: uint8 [..., N, K/2], ``scales`` and ``mins``: uint8 [..., N, K/32],
        ``d`` and ``dmin``: float16 [..., N, K/256]
Q5_K    as Q4_K, and ``qh``: uint8 [..., N, K/8]
Q6_K    ``ql``: uint8 [..., N, K/2], ``qh``: uint8 [..., N, K/4],
        ``scales``: int8 [..., N, K/16], ``d``: float16 [..., N, K/256]
Q2_K    ``q``: uint8 [..., N, K/4], ``scales``: uint8 [..., N, K/16] (low four bits the
        scale, high four the minimum), ``d`` and ``dmin``: float16 [..., N, K/256]
Q3_K    ``q``: uint8 [..., N, K/4], ``qh``: uint8 [..., N, K/8],
        ``scales``: int8 [..., N, K/16], ``d``: float16 [..., N, K/256]
IQ4_XS  ``q``: uint8 [..., N, K/2], ``scales``: int8 [..., N, K/32],
        ``d``: float16 [..., N, K/256]
IQ4_NL  ``q``: uint8 [..., N, K/2], ``d``: float16 [..., N, K/32]
Q4_0    as IQ4_NL
Q4_1    as Q4_0, and ``m``: float16 [..., N, K/32]
Q5_0    as Q4_0, and ``qh``: uint8 [..., N, K/8]
Q5_1    as Q5_0, and ``m``: float16 [..., N, K/32]
MXFP4   ``q``: uint8 [..., N, K/2], ``e``: uint8 [..., N, K/32], the power of two
IQ3_S   ``q``: uint8 [..., N, K/4], ``qh``: uint8 [..., N, K/32], ``signs``: uint8 [..., N, K/8],
        ``scales``: uint8 [..., N, K/64], ``d``: float16 [..., N, K/256]
IQ3_XXS ``q``: uint8 [..., N, K/4], ``signs``: uint32 [..., N, K/32] (four times seven signs, and
        the scale), ``d``: float16 [..., N, K/256]
IQ2_S   ``q`` and ``signs``: uint8 [..., N, K/8], ``qh`` and ``scales``: uint8 [..., N, K/32],
        ``d``: float16 [..., N, K/256]
IQ2_XS  ``q``: uint16 [..., N, K/8], ``scales``: uint8 [..., N, K/32], ``d``: float16 [..., N, K/256]
IQ2_XXS ``q``: uint8 [..., N, K/8], ``signs`` and ``d`` as in IQ3_XXS
IQ1_S   ``q``: uint8 [..., N, K/8], ``qh``: uint16 [..., N, K/32], ``d``: float16 [..., N, K/256]
IQ1_M   ``q``: uint8 [..., N, K/8], ``qh``: uint8 [..., N, K/16], ``scales``: uint8 [..., N, K/32],
        ``d``: float16 [..., N, K/256]
TQ1_0   ``q``: uint8 [..., N, K/8], ``q16``: uint8 [..., N, K/16], ``qh``: uint8 [..., N, K/64],
        ``d``: float16 [..., N, K/256]
TQ2_0   ``q``: uint8 [..., N, K/4], ``d``: float16 [..., N, K/256]
======  ==========================================================================

The bytes of ``q``, ``qh`` and ``ql`` keep the order of the file; only 6-bit
scales and mins are spread to one byte each. That is 4 bytes per superblock of Q4_K
(2.8 %), Q5_K and Q3_K (3.6 %), 2 of IQ4_XS (1.5 %). IQ1_M has its scale once more, in
one piece (3.6 %). Other types are as large as in the file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.formats import FORMATS
from qwen3_moe_jax.convert.formats.base import SUPERBLOCK, ArrayFormat, GGMLType

Array = Any
"""A NumPy or JAX array: this package only looks at ``shape``, ``dtype`` and indexing."""

ROWS = "rows"
LANES16 = "lanes16"
"""Sixteen rows side by side, see :mod:`qwen3_moe_jax.convert.layouts.lanes16`."""

GPU_TILES = "gpu_tiles"
"""Tiles of 8 rows x 256 columns, see :mod:`qwen3_moe_jax.convert.layouts.gpu_tiles`."""

LANES = 16
"""Rows side by side in layout ``LANES16``."""

LAYOUT_VERSION = 1
"""Version of what the layouts below mean; a checkpoint records it."""


ARRAY_FORMATS: dict[GGMLType, dict[str, ArrayFormat]] = {kind: form.arrays for kind, form in FORMATS.items()}
"""The arrays of layout ``"rows"``; the first of each type is the one that ``shape`` is read from."""


def array_shapes(type: GGMLType, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that hold a tensor of ``type`` and logical ``shape`` in layout ``"rows"``."""
    *leading, last = shape
    return {name: (*leading, last // f.weights) for name, f in ARRAY_FORMATS[type].items()}


def array_nbytes(type: GGMLType, shape: tuple[int, ...]) -> dict[str, int]:
    """Bytes of the arrays that hold a tensor of ``type`` and logical ``shape`` in layout ``"rows"``."""
    formats = ARRAY_FORMATS[type]
    shapes = array_shapes(type, shape)
    return {name: math.prod(s) * np.dtype(formats[name].dtype).itemsize for name, s in shapes.items()}


def packed_nbytes(type: GGMLType, shape: tuple[int, ...]) -> int:
    """Bytes that a packed tensor of ``type`` and logical ``shape`` takes in layout ``"rows"``."""
    return sum(array_nbytes(type, shape).values())


Box = tuple[tuple[int, int], ...]
"""Part of a tensor: of each axis the first index and the one after the last."""


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """Weights in their quantized form.

    The logical shape follows from the arrays, so a PackedTensor that a
    transformation has sliced or stacked along leading axes is still right.
    ``kernels_pallas`` registers the class as a JAX pytree: ``arrays`` are its
    leaves, ``type`` and ``layout`` are static.

    Attributes:
      arrays: named arrays; the module docstring lists names, dtypes, shapes.
      type: the quantization type, one for the whole tensor.
      layout: the arrangement of the arrays, settled when packing.
    """

    arrays: Mapping[str, Array]
    type: GGMLType
    layout: str = ROWS

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape ``[..., N, K]``, in weights."""
        name, array = next(iter(ARRAY_FORMATS[self.type].items()))
        shape = self.arrays[name].shape
        if self.layout == LANES16:
            *leading, tiles, words, lanes = shape
            return (*leading, tiles * lanes, words * 4 * array.weights)
        if self.layout == GPU_TILES:  # [..., tile, superblock, vector, row, column group, word]
            *leading, tiles, superblocks, _, rows, _, _ = shape
            return (*leading, tiles * rows, superblocks * SUPERBLOCK)
        *leading, last = shape
        return (*leading, last * array.weights)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the packed arrays take."""
        return sum(a.size * a.dtype.itemsize for a in self.arrays.values())

    def __getitem__(self, index: Any) -> "PackedTensor":
        """Index leading axes (never K): ``w[expert]``, ``w[:, 3:7]``."""
        return PackedTensor({k: a[index] for k, a in self.arrays.items()}, self.type, self.layout)

    def part(self, box: "Box") -> "PackedTensor":
        """The weights inside ``box``, of every axis; of columns whole blocks. Layout "rows" alone.

        Raises:
          ValueError: the columns cut a block, or the layout is another one.
        """
        *leading, (start, stop) = box
        weights = max(array.weights for array in ARRAY_FORMATS[self.type].values())
        if self.layout != ROWS or start % weights or stop % weights:
            raise ValueError(f"{self!r} has no part {box}: its blocks of {weights} weights are not cut")
        index = tuple(slice(*span) for span in leading)
        formats = ARRAY_FORMATS[self.type]
        columns = {name: slice(start // f.weights, stop // f.weights) for name, f in formats.items()}
        arrays = {name: a[(*index, columns[name])] for name, a in self.arrays.items()}
        return PackedTensor(arrays, self.type)

    def __repr__(self) -> str:
        return f"PackedTensor({self.type.name}, shape={self.shape}, layout={self.layout!r})"

"""What a tensor type is to this project: its id, its blocks in a file, its packed arrays and two functions.

One module of this folder describes one type, or types that differ by a detail.
Block sizes and field offsets are facts of ggml's C structs at llama.cpp commit
0c1e57098, file ``ggml/src/ggml-common.h``:
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

SUPERBLOCK = 256
"""Weights in one superblock of a K-quant (``QK_K``)."""

Arrays = Mapping[str, np.ndarray]
"""Arrays of a packed tensor, flattened to ``[blocks, elements of one block]``."""


class GGMLType(IntEnum):
    """Supported tensor types, with the ids of ``enum ggml_type`` (``ggml/include/ggml.h``)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


@dataclass(frozen=True)
class Field:
    """One field of a quantized block: ``count`` values of NumPy ``dtype`` at byte ``offset``."""

    offset: int
    count: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.count * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class BlockFormat:
    """How ``weights`` consecutive weights of a row lie in ``nbytes`` bytes of a file."""

    weights: int
    nbytes: int
    fields: dict[str, Field]

    def row_nbytes(self, row_length: int) -> int:
        """Bytes of one row of ``row_length`` weights (a multiple of ``self.weights``)."""
        return row_length // self.weights * self.nbytes

    def field(self, blocks: np.ndarray, name: str) -> np.ndarray:
        """One field of every block, ``[blocks, count]``: a view of the file's uint8 [blocks, nbytes]."""
        field = self.fields[name]
        return blocks[:, field.offset : field.offset + field.nbytes].view(field.dtype)


@dataclass(frozen=True)
class ArrayFormat:
    """One array of a packed tensor: its NumPy dtype and how many weights one element stands for."""

    dtype: str
    weights: int


@dataclass(frozen=True)
class Format:
    """One tensor type.

    Attributes:
      type: its id.
      block: its bytes in a file.
      arrays: the arrays of layout "rows"; the logical shape is read from the first.
      dequantize: ``(arrays, out)`` fills ``out`` [blocks, weights], float32 or float64, by ggml's
        formula in ggml's order.
      unpack: ``(blocks, out)`` fills the arrays that are not a block's field of the same name, from
        uint8 [blocks, nbytes]; None where all are.
      subblock: weights that share a scale; 1 in types without scales.
      is_difference: whether a weight is ``a - b``, two terms that a backend may sum apart.
    """

    type: GGMLType
    block: BlockFormat
    arrays: dict[str, ArrayFormat]
    dequantize: Callable[[Arrays, np.ndarray], None]
    unpack: Callable[[np.ndarray, Arrays], None] | None = None
    subblock: int = 1
    is_difference: bool = False

    def fill(self, blocks: np.ndarray, out: Arrays) -> None:
        """Re-arranges blocks uint8 [blocks, nbytes] into ``out``."""
        for name in self.arrays:
            field = self.block.fields.get(name)
            if field is not None and field.nbytes == self._block_nbytes(name):
                out[name][...] = self.block.field(blocks, name)
        if self.unpack is not None:
            self.unpack(blocks, out)

    def _block_nbytes(self, name: str) -> int:
        array = self.arrays[name]
        return self.block.weights // array.weights * np.dtype(array.dtype).itemsize


def apply_scales(arrays: Arrays, out: np.ndarray, subblock: int) -> None:
    """``(d * scale) * q`` in place for subblocks of so many weights, each product rounded as ggml does."""
    subblocks = out.reshape(len(out), -1, subblock)
    subblocks *= (arrays["d"].astype(out.dtype) * arrays["scales"])[:, :, None]

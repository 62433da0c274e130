"""The ggml tensor types that this project reads: block sizes and field offsets.

Every number here is a fact of ggml's C structs, at llama.cpp commit
0c1e57098, file ``ggml/src/ggml-common.h`` (``block_q4_K``, ``block_q5_K``,
``block_q6_K``, ``block_q8_0``) and ``ggml/include/ggml.h`` (``enum ggml_type``):
https://github.com/ggml-org/llama.cpp/blob/0c1e57098/ggml/src/ggml-common.h
"""

from dataclasses import dataclass
from enum import IntEnum

SUPERBLOCK = 256
"""Weights in one superblock of a K-quant (``QK_K``)."""


class GGMLType(IntEnum):
    """Supported tensor types, with the ids that GGUF files carry."""

    F32 = 0
    F16 = 1
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


@dataclass(frozen=True)
class Field:
    """One field of a quantized block: ``count`` values of NumPy ``dtype`` at byte ``offset``."""

    offset: int
    count: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.count * (2 if self.dtype in ("<f2", "<u2") else 4 if self.dtype == "<f4" else 1)


@dataclass(frozen=True)
class BlockFormat:
    """How ``weights`` consecutive weights of a row lie in ``nbytes`` bytes of a file."""

    weights: int
    nbytes: int
    fields: dict[str, Field]

    def row_nbytes(self, row_length: int) -> int:
        """Bytes of one row of ``row_length`` weights (a multiple of ``self.weights``)."""
        return row_length // self.weights * self.nbytes


BLOCK_FORMATS: dict[GGMLType, BlockFormat] = {
    GGMLType.F32: BlockFormat(1, 4, {"w": Field(0, 1, "<f4")}),
    GGMLType.F16: BlockFormat(1, 2, {"w": Field(0, 1, "<f2")}),
    GGMLType.BF16: BlockFormat(1, 2, {"w": Field(0, 1, "<u2")}),
    GGMLType.Q8_0: BlockFormat(32, 34, {"d": Field(0, 1, "<f2"), "q": Field(2, 32, "i1")}),
    GGMLType.Q4_K: BlockFormat(
        SUPERBLOCK,
        144,
        {
            "d": Field(0, 1, "<f2"),
            "dmin": Field(2, 1, "<f2"),
            "scales": Field(4, 12, "u1"),  # 8 six-bit scales and 8 six-bit mins
            "q": Field(16, 128, "u1"),
        },
    ),
    GGMLType.Q5_K: BlockFormat(
        SUPERBLOCK,
        176,
        {
            "d": Field(0, 1, "<f2"),
            "dmin": Field(2, 1, "<f2"),
            "scales": Field(4, 12, "u1"),
            "qh": Field(16, 32, "u1"),
            "q": Field(48, 128, "u1"),
        },
    ),
    GGMLType.Q6_K: BlockFormat(
        SUPERBLOCK,
        210,
        {
            "ql": Field(0, 128, "u1"),
            "qh": Field(128, 64, "u1"),
            "scales": Field(192, 16, "i1"),
            "d": Field(208, 1, "<f2"),
        },
    ),
}

SUPPORTED_TYPES: tuple[GGMLType, ...] = tuple(BLOCK_FORMATS)

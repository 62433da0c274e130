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


@dataclass(frozen=True)
class TypeSize:
    """Name of a ggml type, and the bytes that ``weights`` consecutive weights of a row take."""

    name: str
    weights: int
    nbytes: int


KNOWN_TYPES: dict[int, TypeSize] = {
    0: TypeSize("F32", 1, 4),
    1: TypeSize("F16", 1, 2),
    2: TypeSize("Q4_0", 32, 18),
    3: TypeSize("Q4_1", 32, 20),
    6: TypeSize("Q5_0", 32, 22),
    7: TypeSize("Q5_1", 32, 24),
    8: TypeSize("Q8_0", 32, 34),
    9: TypeSize("Q8_1", 32, 36),
    10: TypeSize("Q2_K", 256, 84),
    11: TypeSize("Q3_K", 256, 110),
    12: TypeSize("Q4_K", 256, 144),
    13: TypeSize("Q5_K", 256, 176),
    14: TypeSize("Q6_K", 256, 210),
    15: TypeSize("Q8_K", 256, 292),
    16: TypeSize("IQ2_XXS", 256, 66),
    17: TypeSize("IQ2_XS", 256, 74),
    18: TypeSize("IQ3_XXS", 256, 98),
    19: TypeSize("IQ1_S", 256, 50),
    20: TypeSize("IQ4_NL", 32, 18),
    21: TypeSize("IQ3_S", 256, 110),
    22: TypeSize("IQ2_S", 256, 82),
    23: TypeSize("IQ4_XS", 256, 136),
    24: TypeSize("I8", 1, 1),
    25: TypeSize("I16", 1, 2),
    26: TypeSize("I32", 1, 4),
    27: TypeSize("I64", 1, 8),
    28: TypeSize("F64", 1, 8),
    29: TypeSize("IQ1_M", 256, 56),
    30: TypeSize("BF16", 1, 2),
    34: TypeSize("TQ1_0", 256, 54),
    35: TypeSize("TQ2_0", 256, 66),
    39: TypeSize("MXFP4", 32, 17),
    40: TypeSize("NVFP4", 64, 36),
    41: TypeSize("Q1_0", 128, 18),
    42: TypeSize("Q2_0", 64, 18),
}
"""Every type id of ggml. A file may hold any of these; only :class:`GGMLType` can be computed with.

Ids 4, 5, 31 to 33 and 36 to 38 were removed from ggml. ``block_q8_1`` is two
float16 and 32 int8: 36 bytes.
"""

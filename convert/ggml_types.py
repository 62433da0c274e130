"""The ggml tensor types: those that this project reads, and the size of every other one.

What a supported type is, is said in its module of :mod:`qwen3_moe_jax.convert.formats`.
"""

from dataclasses import dataclass

from qwen3_moe_jax.convert.formats import FORMATS
from qwen3_moe_jax.convert.formats.base import SUPERBLOCK, BlockFormat, Field, GGMLType

__all__ = [
    "BLOCK_FORMATS",
    "KNOWN_TYPES",
    "SUPERBLOCK",
    "SUPPORTED_TYPES",
    "BlockFormat",
    "Field",
    "GGMLType",
    "TypeSize",
]

BLOCK_FORMATS: dict[GGMLType, BlockFormat] = {kind: form.block for kind, form in FORMATS.items()}

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

"""Every tensor type that this project computes with: one module of facts each, and the table of them all."""

from qwen3_moe_jax.convert.formats.base import Format, GGMLType
from qwen3_moe_jax.convert.formats.iq1 import IQ1_M, IQ1_S
from qwen3_moe_jax.convert.formats.iq2 import IQ2_S, IQ2_XS, IQ2_XXS
from qwen3_moe_jax.convert.formats.iq3 import IQ3_S, IQ3_XXS
from qwen3_moe_jax.convert.formats.iq4 import IQ4_NL, IQ4_XS
from qwen3_moe_jax.convert.formats.legacy import Q4_0, Q4_1, Q5_0, Q5_1
from qwen3_moe_jax.convert.formats.mxfp4 import MXFP4
from qwen3_moe_jax.convert.formats.plain import BF16, F16, F32
from qwen3_moe_jax.convert.formats.q2_k import Q2_K
from qwen3_moe_jax.convert.formats.q3_k import Q3_K
from qwen3_moe_jax.convert.formats.q4_k import Q4_K
from qwen3_moe_jax.convert.formats.q5_k import Q5_K
from qwen3_moe_jax.convert.formats.q6_k import Q6_K
from qwen3_moe_jax.convert.formats.q8_0 import Q8_0
from qwen3_moe_jax.convert.formats.ternary import TQ1_0, TQ2_0

_ALL = (
    *(F32, F16, BF16, Q8_0, Q4_K, Q5_K, Q6_K, Q2_K, Q3_K, IQ4_XS, IQ4_NL, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4),
    *(IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_S, IQ1_M, TQ1_0, TQ2_0),
)

FORMATS: dict[GGMLType, Format] = {form.type: form for form in _ALL}
"""In the order in which messages and tables list the types."""

SCALE_NAMES = ("w", "d", "dmin", "m", "e")
"""Packed arrays where a NaN or an infinity may be: floats, and ``e``, the power of two of MXFP4."""

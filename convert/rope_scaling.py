"""Frequencies of rotary positions, plain, linear and YaRN: one definition for every backend.

Sources: RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071 section 3, in the form
that llama.cpp and Transformers share; llama.cpp at commit 0c1e57098,
``ggml/src/ggml-cpu/ops.cpp`` (``rope_yarn``) and ``ggml/src/ggml.c``
(``ggml_rope_yarn_corr_dims``).
"""

# Elements of untrusted lists and of NumPy functions have types that no declaration gives.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.metadata_keys import (
    PREFIX,
    KeyReader,
    as_integer,
    check_float,
    check_integer,
    describe,
    hparam_error,
)

_SCALING = PREFIX + "rope.scaling."


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the trained context.

    Attributes:
      type: ``"linear"`` (angles divided by ``factor``) or ``"yarn"``.
      factor: by how much the context is stretched, > 0.
      original_max_position_embeddings: trained context; YaRN's ramp needs it.
      attention_factor: multiplies the rotated queries and keys; None means
        ``0.1 ln(factor) + 1`` for YaRN and 1 for linear.
      beta_fast, beta_slow: the ends of YaRN's ramp, in turns over the trained context.

    Raises:
      ModelFileError: ``E_HPARAM`` for a value out of range.
    """

    type: str
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        _check_type(self.type)
        check_float(_SCALING + "factor", self.factor, 0.0, 4096.0)
        if self.type == "yarn" and self.factor < 1.0:
            raise hparam_error(_SCALING + "factor", f"is {self.factor:g}; YaRN needs at least 1")
        check_integer(_SCALING + "original_context_length", self.original_max_position_embeddings, 1, 2**20)
        if self.attention_factor is not None:
            check_float(_SCALING + "attn_factor", self.attention_factor, 0.0, 100.0)
        check_float(_SCALING + "yarn_beta_fast", self.beta_fast, 0.0, 1e6)
        check_float(_SCALING + "yarn_beta_slow", self.beta_slow, 0.0, 1e6)
        if self.beta_fast <= self.beta_slow:
            raise hparam_error(
                _SCALING + "yarn_beta_fast", f"is {self.beta_fast:g}; it must be above yarn_beta_slow"
            )

    @property
    def magnitude(self) -> float:
        """Factor on cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 1.0 + 0.1 * math.log(self.factor) if self.type == "yarn" and self.factor > 1 else 1.0


def _check_type(kind: object) -> None:
    if kind not in ("linear", "yarn"):
        raise hparam_error(_SCALING + "type", f"is {describe(kind)}; supported: none, linear, yarn")


def rope_frequencies(
    head_dim: int, rope_theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
    """Angle per position of each rotated pair, and the magnitude of cos and sin.

    Returns:
      frequencies float64 [H / 2], in radians: pair j of position p turns by ``p * frequencies[j]``.
      magnitude: factor on cos and sin; 1 without scaling.
    """
    pair = np.arange(head_dim // 2)
    frequencies = float(rope_theta) ** (-2.0 * pair / head_dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.type == "linear":
        return frequencies / scaling.factor, scaling.magnitude

    def pair_of(turns: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope_theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), head_dim - 1)
    interpolated = np.clip((pair - low) / max(high - low, 0.001), 0.0, 1.0)
    scaled = frequencies / scaling.factor
    return scaled * interpolated + frequencies * (1.0 - interpolated), scaling.magnitude


def read_rope_scaling(read: KeyReader) -> RopeScaling | None:
    """The scaling that a file's metadata asks for; None for positions as they were trained.

    Raises:
      ModelFileError: ``E_HPARAM`` naming the key.
    """
    prefix = "rope.scaling."
    kind: Any = read.get(prefix + "type")
    factor_key = prefix + "factor"
    if read.get(factor_key) is None and read.get("rope.scale_linear") is not None:
        factor_key = "rope.scale_linear"
    given = read.get(prefix + "attn_factor")
    attention_factor = None if given is None else read.number(prefix + "attn_factor")
    if kind is None and read.get(factor_key) is not None:
        kind = "linear"
    if kind is None or kind == "none":
        if attention_factor not in (None, 1.0):
            raise hparam_error(_SCALING + "attn_factor", "is set, but rope.scaling.type is not")
        return None
    _check_type(kind)
    factor = read.number(factor_key)
    if kind == "linear" and factor == 1.0 and attention_factor in (None, 1.0):
        return None
    original_key = prefix + "original_context_length"
    original: Any = as_integer(read.get(original_key))
    if original is None:
        original = read.need(original_key if kind == "yarn" else "context_length")
    if kind == "yarn" and attention_factor is not None and factor > 0.0:
        # GGUF's factor multiplies YaRN's own magnitude (llama.cpp 001d906, src/llama-context.cpp,
        # cparams.yarn_attn_factor *= hparams.rope_attn_factor); Hugging Face's replaces it.
        attention_factor *= 0.1 * math.log(factor) + 1.0
    return RopeScaling(
        type=kind,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        beta_fast=read.number(prefix + "yarn_beta_fast", 32.0),
        beta_slow=read.number(prefix + "yarn_beta_slow", 1.0),
    )

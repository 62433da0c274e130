"""The hyper-parameters of a Qwen3-MoE model, checked one by one.

GGUF metadata is not trusted: every value is checked for its type and range,
and a key without which the model would silently compute something else is
required even where llama.cpp has a default. ``metadata_keys`` has the table of
all keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.metadata_keys import (
    ARCHITECTURE,
    PREFIX,
    RANGES,
    REQUIRED,
    KeyReader,
    check_range,
    describe,
    hparam_error,
)
from qwen3_moe_jax.convert.rope_scaling import RopeScaling, read_rope_scaling, rope_frequencies

__all__ = [
    "ARCHITECTURE",
    "MIN_WEIGHT_SUM",
    "PRESETS",
    "Qwen3MoeConfig",
    "RopeScaling",
    "check_architecture",
]

MIN_WEIGHT_SUM = 2.0**-14
"""The chosen experts' probabilities are divided by their sum, and at least by this (llama.cpp's clamp)."""


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """What a Qwen3-MoE model computes, in the names of Hugging Face's config.

    Raises:
      ModelFileError: ``E_HPARAM`` naming the GGUF key of a value that is out of range.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        for field in RANGES:
            check_range(field, getattr(self, field))
        if self.num_attention_heads % self.num_key_value_heads:
            raise hparam_error(
                PREFIX + "attention.head_count_kv",
                f"is {self.num_key_value_heads}; it must divide attention.head_count, "
                f"{self.num_attention_heads}",
            )
        if self.head_dim % 2:
            raise hparam_error(
                PREFIX + "attention.key_length", f"is {self.head_dim}; rotary positions need an even number"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise hparam_error(
                PREFIX + "expert_used_count",
                f"is {self.num_experts_per_tok}, more than expert_count, {self.num_experts}",
            )

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, object], *, tie_word_embeddings: bool, vocab_size: int
    ) -> "Qwen3MoeConfig":
        """The config that a GGUF file's metadata describes.

        Args:
          metadata: keys and values of the file, as :attr:`GGUFFile.metadata` holds them.
          tie_word_embeddings: True where the file has no ``output.weight``.
          vocab_size: rows of ``token_embd.weight``.

        Raises:
          ModelFileError: ``E_ARCH`` for another architecture, ``E_HPARAM`` for a
            key that is missing, of the wrong type or out of range.
        """
        check_architecture(metadata)
        read = KeyReader(metadata)
        head_dim, context = read.integer("attention.key_length"), read.integer("context_length")
        read.refuse_other_computations(head_dim, context)
        read.equal("attention.value_length", head_dim, "attention.key_length")
        read.equal("rope.dimension_count", head_dim, "attention.key_length")
        read.equal("vocab_size", vocab_size, "the rows of token_embd.weight")
        numbers: dict[str, Any] = {
            field: read.number(key.name) if isinstance(key.low, float) else read.integer(key.name)
            for field, key in RANGES.items()
            if key.rule == REQUIRED
        }
        return cls(
            **numbers,
            vocab_size=vocab_size,
            moe_intermediate_size=read.expert_width(),
            tie_word_embeddings=tie_word_embeddings,
            rope_scaling=read_rope_scaling(read),
        )

    def rope_frequencies(self) -> tuple[np.ndarray, float]:
        """Radians per position of each pair, float64 [H / 2], and the magnitude of cos and sin."""
        return rope_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)


def check_architecture(metadata: Mapping[str, object]) -> None:
    """Raise ``ModelFileError`` ``E_ARCH`` unless ``general.architecture`` is qwen3moe."""
    key = "general.architecture"
    found = metadata.get(key)
    if found == ARCHITECTURE:
        return
    what = "is missing" if found is None else f"is {describe(found)}"
    raise ModelFileError("E_ARCH", f"{key} {what}; this program runs '{ARCHITECTURE}' models", name=key)


_QWEN3_30B_A3B = Qwen3MoeConfig(
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=40_960,
)

PRESETS: dict[str, Qwen3MoeConfig] = {
    "Qwen3-30B-A3B": _QWEN3_30B_A3B,
    "Qwen3-Coder-30B-A3B": replace(_QWEN3_30B_A3B, rope_theta=1e7, max_position_embeddings=262_144),
    "Qwen3-235B-A22B": replace(
        _QWEN3_30B_A3B,
        hidden_size=4096,
        num_hidden_layers=94,
        num_attention_heads=64,
        moe_intermediate_size=1536,
    ),
    "Qwen3-Coder-480B-A35B": replace(
        _QWEN3_30B_A3B,
        hidden_size=6144,
        num_hidden_layers=62,
        num_attention_heads=96,
        num_key_value_heads=8,
        num_experts=160,
        moe_intermediate_size=2560,
        rope_theta=1e7,
        max_position_embeddings=262_144,
    ),
}
"""The published models, by name; sources: their ``config.json`` at https://huggingface.co/Qwen."""

"""The hyper-parameters of a Qwen3-MoE model, checked one by one.

GGUF metadata is not trusted: every value is checked for its type and range,
and a key without which the model would silently compute something else is
required even where llama.cpp has a default. The decisions:

=====================================  ==========================================================
key (after ``qwen3moe.``)              when absent
=====================================  ==========================================================
block_count, embedding_length,         refused
context_length, expert_count,
expert_used_count,
attention.head_count, .head_count_kv,
attention.layer_norm_rms_epsilon
attention.key_length                   refused (llama.cpp: embedding_length / head_count, which is
                                       64 for Qwen3-30B-A3B, whose heads have 128)
attention.value_length                 key_length; any other value is refused
rope.freq_base                         refused (llama.cpp: 10000, 100 to 1000 times too small)
rope.dimension_count                   key_length; any other value is refused
expert_feed_forward_length             feed_forward_length / expert_used_count, as llama.cpp does
                                       (the shapes of the tensors must confirm it)
rope.scaling.type                      no scaling, or linear when rope.scaling.factor is there
rope.scaling.original_context_length   refused for YaRN (llama.cpp: context_length, which is not
                                       what Qwen's recipe means)
=====================================  ==========================================================

Keys that would change the computation to something that Qwen3-MoE does not do
(a shared expert, another router function, a sliding window ...) are refused
unless they hold the value that changes nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qwen3_moe_jax.convert.errors import ModelFileError, quote

ARCHITECTURE = "qwen3moe"

MIN_WEIGHT_SUM = 2.0**-14
"""The chosen experts' probabilities are divided by their sum, and at least by this (llama.cpp's clamp)."""

_PREFIX = ARCHITECTURE + "."

# field: (key after the prefix, smallest, largest value)
_INTEGERS: dict[str, tuple[str, int, int]] = {
    "vocab_size": ("vocab_size", 1, 2**20),
    "hidden_size": ("embedding_length", 1, 2**16),
    "num_hidden_layers": ("block_count", 1, 512),
    "num_attention_heads": ("attention.head_count", 1, 1024),
    "num_key_value_heads": ("attention.head_count_kv", 1, 1024),
    "head_dim": ("attention.key_length", 2, 1024),
    "num_experts": ("expert_count", 1, 1024),
    "num_experts_per_tok": ("expert_used_count", 1, 1024),
    "moe_intermediate_size": ("expert_feed_forward_length", 1, 2**16),
    "max_position_embeddings": ("context_length", 1, 2**20),
}
# field: (key after the prefix, exclusive lower, inclusive upper bound)
_FLOATS: dict[str, tuple[str, float, float]] = {
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", 0.0, 0.01),
    "rope_theta": ("rope.freq_base", 1.0, 1e12),
}
# Keys that the graph of Qwen3-MoE leaves no choice in: only these values mean what is computed.
_FIXED: dict[str, tuple[object, ...]] = {
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "leading_dense_block_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_gating_func": (0, 1),  # 1 is softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def _hparam_error(key: str, problem: str) -> ModelFileError:
    return ModelFileError("E_HPARAM", f"{key} {problem}", name=key)


def _check_integer(key: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _hparam_error(key, f"must be one integer, found {_describe(value)}")
    if not low <= value <= high:
        raise _hparam_error(key, f"is {value}; it must be from {low} to {high}")
    return value


def _check_float(key: str, value: object, above: float, most: float) -> float:
    if not isinstance(value, float):
        raise _hparam_error(key, f"must be one float, found {_describe(value)}")
    if not above < value <= most:  # NaN is refused too
        raise _hparam_error(key, f"is {value:g}; it must be finite, above {above:g}, at most {most:g}")
    return value


def _describe(value: object) -> str:
    if isinstance(value, str):
        return f"the text {quote(value)}"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {value}"
    return "an array" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


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
        scaling = _PREFIX + "rope.scaling."
        if self.type not in ("linear", "yarn"):
            raise _hparam_error(scaling + "type", f"is {_describe(self.type)}; supported: none, linear, yarn")
        _check_float(scaling + "factor", self.factor, 0.0, 4096.0)
        if self.type == "yarn" and self.factor < 1.0:
            raise _hparam_error(scaling + "factor", f"is {self.factor:g}; YaRN needs at least 1")
        _check_integer(scaling + "original_context_length", self.original_max_position_embeddings, 1, 2**20)
        if self.attention_factor is not None:
            _check_float(scaling + "attn_factor", self.attention_factor, 0.0, 100.0)
        _check_float(scaling + "yarn_beta_fast", self.beta_fast, 0.0, 1e6)
        _check_float(scaling + "yarn_beta_slow", self.beta_slow, 0.0, 1e6)
        if self.beta_fast <= self.beta_slow:
            raise _hparam_error(
                scaling + "yarn_beta_fast", f"is {self.beta_fast:g}; it must be above yarn_beta_slow"
            )


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
        for field, (key, low, high) in _INTEGERS.items():
            _check_integer(_PREFIX + key, getattr(self, field), low, high)
        for field, (key, above, most) in _FLOATS.items():
            _check_float(_PREFIX + key, getattr(self, field), above, most)
        if self.num_attention_heads % self.num_key_value_heads:
            raise _hparam_error(
                _PREFIX + "attention.head_count_kv",
                f"is {self.num_key_value_heads}; it must divide attention.head_count, "
                f"{self.num_attention_heads}",
            )
        if self.head_dim % 2:
            raise _hparam_error(
                _PREFIX + "attention.key_length", f"is {self.head_dim}; rotary positions need an even number"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise _hparam_error(
                _PREFIX + "expert_used_count",
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
        read = _Reader(metadata)
        read.fixed_values()
        head_dim = read.integer("attention.key_length")
        read.equal("attention.value_length", head_dim, "attention.key_length")
        read.equal("rope.dimension_count", head_dim, "attention.key_length")
        read.equal("vocab_size", vocab_size, "the rows of token_embd.weight")
        read_directly = {
            field: read.integer(key)
            for field, (key, _, _) in _INTEGERS.items()
            if field not in ("vocab_size", "head_dim", "moe_intermediate_size")
        }
        return cls(
            **read_directly,
            vocab_size=vocab_size,
            head_dim=head_dim,
            moe_intermediate_size=read.expert_width(),
            rms_norm_eps=read.number("attention.layer_norm_rms_epsilon"),
            rope_theta=read.number("rope.freq_base"),
            tie_word_embeddings=tie_word_embeddings,
            rope_scaling=read.rope_scaling(),
        )


def check_architecture(metadata: Mapping[str, object]) -> None:
    """Raise ``ModelFileError`` ``E_ARCH`` unless ``general.architecture`` is qwen3moe."""
    key = "general.architecture"
    found = metadata.get(key)
    if found == ARCHITECTURE:
        return
    what = "is missing" if found is None else f"is {_describe(found)}"
    raise ModelFileError("E_ARCH", f"{key} {what}; this program runs '{ARCHITECTURE}' models", name=key)


class _Reader:
    """Typed look-ups in the metadata; ranges are checked where values meet the config."""

    def __init__(self, metadata: Mapping[str, object]):
        self._metadata = metadata

    def _get(self, key: str) -> object:
        return self._metadata.get(_PREFIX + key)

    def _need(self, key: str) -> object:
        value = self._get(key)
        if value is None:
            raise _hparam_error(_PREFIX + key, "is missing from the file; convert the model again")
        return value

    def integer(self, key: str) -> int:
        _, low, high = next(row for row in _INTEGERS.values() if row[0] == key)
        return _check_integer(_PREFIX + key, self._need(key), low, high)

    def number(self, key: str, default: float | None = None) -> float:
        value = self._need(key) if default is None else self._get(key)
        return default if value is None else _check_float(_PREFIX + key, value, -math.inf, math.inf)

    def equal(self, key: str, expected: int, what: str) -> None:
        """An optional key that may only repeat what is known."""
        value = self._get(key)
        if value is None:
            return
        if _check_integer(_PREFIX + key, value, -(2**63), 2**64) != expected:
            raise _hparam_error(_PREFIX + key, f"is {value}; it must equal {what}, {expected}")

    def fixed_values(self) -> None:
        for key, allowed in _FIXED.items():
            value = self._get(key)
            if value is None:
                continue
            if type(value) is not type(allowed[0]) or value not in allowed:
                wanted = " or ".join(str(a) for a in allowed)
                raise _hparam_error(_PREFIX + key, f"is {_describe(value)}; Qwen3-MoE supports only {wanted}")

    def expert_width(self) -> int:
        """Width of one expert: a scalar, or an array that gives every layer the same."""
        key = "expert_feed_forward_length"
        value = self._get(key)
        if value is None:
            return self._derived_expert_width()
        if isinstance(value, list):
            layers = self.integer("block_count")
            if len(value) != layers or any(v != value[0] for v in value):
                raise _hparam_error(
                    _PREFIX + key, f"is an array; it must hold {layers} equal values, one a layer"
                )
            value = value[0]
        return _check_integer(_PREFIX + key, value, *_INTEGERS["moe_intermediate_size"][1:])

    def _derived_expert_width(self) -> int:
        key = "feed_forward_length"
        if self._get(key) is None:
            raise _hparam_error(
                _PREFIX + "expert_feed_forward_length", "is missing from the file; convert the model again"
            )
        used = self.integer("expert_used_count")
        dense = _check_integer(_PREFIX + key, self._get(key), 1, 2**20)
        if dense % used:
            raise _hparam_error(
                _PREFIX + key,
                f"is {dense}; without expert_feed_forward_length it must be a multiple of "
                f"expert_used_count, {used}",
            )
        return dense // used

    def rope_scaling(self) -> RopeScaling | None:
        prefix = "rope.scaling."
        kind = self._get(prefix + "type")
        attention_factor = self._attention_factor()
        if kind is None and self._get(prefix + "factor") is not None:
            kind = "linear"
        if kind is None or kind == "none":
            if attention_factor not in (None, 1.0):
                raise _hparam_error(_PREFIX + prefix + "attn_factor", "is set, but rope.scaling.type is not")
            return None
        factor = self.number(prefix + "factor")
        if kind == "linear" and factor == 1.0 and attention_factor in (None, 1.0):
            return None
        original_key = prefix + "original_context_length"
        original = self._get(original_key)
        if original is None:
            original = self._need(original_key if kind == "yarn" else "context_length")
        if kind == "yarn" and attention_factor is not None and factor > 0.0:
            # GGUF's factor multiplies YaRN's own magnitude (llama.cpp 001d906, src/llama-context.cpp,
            # cparams.yarn_attn_factor *= hparams.rope_attn_factor); Hugging Face's replaces it.
            attention_factor *= 0.1 * math.log(factor) + 1.0
        return RopeScaling(
            type=kind,
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=attention_factor,
            beta_fast=self.number(prefix + "yarn_beta_fast", 32.0),
            beta_slow=self.number(prefix + "yarn_beta_slow", 1.0),
        )

    def _attention_factor(self) -> float | None:
        key = "rope.scaling.attn_factor"
        return None if self._get(key) is None else self.number(key)


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

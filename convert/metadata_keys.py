"""Every metadata key of a ``qwen3moe`` file that says what is computed, and what is done with it: one table.

Each key that llama.cpp's loader reads for this architecture or for all of them
is **required**, **honoured**, **refused** (unless it has the value that changes
nothing) or **ignored**, since it changes nothing that is computed here. A key
that is not in the table is ignored too. ``docs/reference/metadata.md`` shows the table.

Source: ``src/llama-arch.cpp`` (names) and ``src/llama-model.cpp``
(``load_hparams``) of llama.cpp at commit 0c1e57098.
"""

# Elements of untrusted lists and of NumPy functions have types that no declaration gives.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qwen3_moe_jax.convert.errors import ModelFileError, quote

ARCHITECTURE = "qwen3moe"
PREFIX = ARCHITECTURE + "."

REQUIRED, HONOURED, REFUSED, IGNORED = "required", "honoured", "refused", "ignored"


@dataclass(frozen=True)
class Key:
    """One metadata key.

    Attributes:
      name: after ``qwen3moe.``; with a dot in front, the whole key.
      rule: REQUIRED, HONOURED, REFUSED or IGNORED.
      words: what it says, and what holds where it is absent.
      neutral: of a refused key, the values that change nothing.
      field: of ``Qwen3MoeConfig``, for one that is a number with a range.
      low, high: that range; the lower bound of a float is exclusive.
    """

    name: str
    rule: str
    words: str
    neutral: tuple[object, ...] = ()
    field: str | None = None
    low: float = 0
    high: float = 0

    @property
    def full_name(self) -> str:
        return self.name[1:] if self.name.startswith(".") else PREFIX + self.name


def _number(name: str, field: str, low: float, high: float, words: str, rule: str = REQUIRED) -> Key:
    return Key(name, rule, words, (), field, low, high)


def _refused(name: str, words: str, *neutral: object) -> Key:
    return Key(name, REFUSED, words, neutral)


KEYS: tuple[Key, ...] = (
    Key(".general.architecture", REQUIRED, "must be qwen3moe"),
    _refused(".general.type", "an adapter, a projector or a matrix of importances is no model", "model"),
    _number("block_count", "num_hidden_layers", 1, 512, "layers"),
    _number("embedding_length", "hidden_size", 1, 2**16, "size of the residual stream"),
    _number("context_length", "max_position_embeddings", 2, 2**20, "positions"),
    _number("expert_count", "num_experts", 1, 1024, "experts per layer"),
    _number("expert_used_count", "num_experts_per_tok", 1, 1024, "experts per token"),
    _number("attention.head_count", "num_attention_heads", 1, 1024, "query heads"),
    _number("attention.head_count_kv", "num_key_value_heads", 1, 1024, "key and value heads"),
    _number("attention.layer_norm_rms_epsilon", "rms_norm_eps", 0.0, 0.01, "of every RMS norm"),
    _number(
        "attention.key_length",
        "head_dim",
        2,
        1024,
        "size of a head (llama.cpp has a default that is wrong for Qwen3-30B-A3B)",
    ),
    _number("rope.freq_base", "rope_theta", 1.0, 1e12, "base of rotary positions (llama.cpp's default: 1e4)"),
    Key("attention.value_length", HONOURED, "absent: key_length; another value is refused"),
    Key("rope.dimension_count", HONOURED, "absent: key_length; another value is refused"),
    _number("vocab_size", "vocab_size", 1, 2**20, "must be the rows of token_embd.weight", HONOURED),
    _number(
        "expert_feed_forward_length",
        "moe_intermediate_size",
        1,
        2**16,
        "width of an expert, or an array of equal ones; absent: feed_forward_length / expert_used_count",
        HONOURED,
    ),
    Key("feed_forward_length", HONOURED, "read where expert_feed_forward_length is absent"),
    Key("rope.scaling.type", HONOURED, "none, linear or yarn; absent: linear where there is a factor"),
    Key("rope.scaling.factor", HONOURED, "by how much the context is stretched"),
    Key("rope.scale_linear", HONOURED, "an older name of rope.scaling.factor, read where that is absent"),
    Key("rope.scaling.original_context_length", HONOURED, "required for yarn; absent: context_length"),
    Key("rope.scaling.attn_factor", HONOURED, "multiplies the magnitude of rotated queries and keys"),
    Key("rope.scaling.yarn_beta_fast", HONOURED, "absent: 32"),
    Key("rope.scaling.yarn_beta_slow", HONOURED, "absent: 1"),
    _refused("rope.scaling.yarn_ext_factor", "another mix of YaRN's ramp", -1.0, 1.0),
    _refused("rope.scaling.yarn_attn_factor", "another magnitude", 1.0),
    _refused("rope.scaling.yarn_log_multiplier", "another magnitude", 0.0),
    _refused("rope.scaling.alpha", "frequencies that depend on the context's length", 0.0, 1.0),
    _refused("rope.dimension_sections", "positions of several axes (images)"),
    _refused("expert_shared_count", "experts that every token takes", 0),
    _refused("expert_shared_feed_forward_length", "experts that every token takes", 0),
    _refused("expert_chunk_feed_forward_length", "experts in chunks", 0),
    _refused("leading_dense_block_count", "layers without experts", 0),
    _refused("interleave_moe_layer_step", "layers without experts", 0, 1),
    _refused("moe_every_n_layers", "layers without experts", 0, 1),
    _refused("expert_group_count", "a choice of experts by groups", 0, 1),
    _refused("expert_group_used_count", "a choice of experts by groups", 0, 1),
    _refused("expert_gating_func", "another function of the router; 1 is softmax", 0, 1),
    _refused("expert_weights_norm", "expert weights that do not sum to one", True),
    _refused("expert_weights_scale", "expert weights times a factor", 0.0, 1.0),
    _refused("nextn_predict_layers", "layers that predict further tokens", 0),
    _refused("attention.causal", "attention to later positions", True),
    _refused("attention.scale", "another scale of the scores than 1 / sqrt(key_length)", 0.0),
    _refused("attention.sliding_window", "attention to fewer positions than context_length", 0),
    _refused("attention.clamp_kqv", "values that are cut off", 0.0),
    _refused("attention.max_alibi_bias", "a bias by distance", 0.0),
    _refused("attention.temperature_scale", "scores that depend on the position", 0.0),
    _refused("attention.output_scale", "an attention output times a factor", 0.0, 1.0),
    _refused("attention.value_scale", "values times a factor", 0.0, 1.0),
    _refused("attention.q_lora_rank", "queries of low rank", 0),
    _refused("attention.kv_lora_rank", "keys and values of low rank", 0),
    _refused("attn_logit_softcapping", "scores that are capped", 0.0),
    _refused("router_logit_softcapping", "router logits that are capped", 0.0),
    _refused("final_logit_softcapping", "logits that are capped", 0.0),
    _refused("logit_scale", "logits times a factor", 0.0, 1.0),
    _refused("embedding_scale", "embeddings times a factor", 0.0, 1.0),
    _refused("residual_scale", "residual connections times a factor", 0.0, 1.0),
    _refused("use_parallel_residual", "attention and experts side by side", False),
    _refused("swin_norm", "norms in other places", False),
    _refused("pooling_type", "one vector for a text in place of logits", 0),
    _refused("classifier.output_labels", "classes in place of logits"),
    _refused("tensor_data_layout", "rows of q and k in another order", "", "reference"),
    Key(".general.alignment", HONOURED, "of the tensor data; absent: 32"),
    Key(
        ".general.sampling.*",
        HONOURED,
        "recommended; a value that cannot be used is named and left out",
    ),
    Key(".split.no, .count, .tensors.count", HONOURED, "of a file in shards"),
    Key(".tokenizer.ggml.*", HONOURED, "the vocabulary; every eos, eot and eom id ends an answer"),
    Key(".tokenizer.chat_template", HONOURED, "how messages become a prompt"),
    Key("rope.scaling.finetuned", IGNORED, "how the model was trained"),
    Key("attention.sliding_window_pattern", IGNORED, "which layers have a sliding window; these are refused"),
    Key("rope.freq_base_swa", IGNORED, "the base in sliding windows, which are refused"),
    Key("attention.layer_norm_epsilon", IGNORED, "of norms that Qwen3-MoE does not have"),
    Key(".general.file_type", IGNORED, "a label: every tensor has its own type"),
    Key(".general.name, .basename, .finetune and other descriptions", IGNORED, "shown, and name the family"),
)

_PER_LAYER = (
    "attention.head_count",
    "attention.head_count_kv",
    "expert_used_count",
    "expert_feed_forward_length",
    "feed_forward_length",
)
"""Keys that may be an array with a value for each layer."""

_BY_NAME = {key.name: key for key in KEYS}
RANGES = {key.field: key for key in KEYS if key.field}
"""Keys with a range, by field of the config."""


_READ_PREFIXES = ("tokenizer.", "split.", "general.sampling.", "general.alignment")


def is_read(full_name: str) -> bool:
    """Whether what a key says matters: text of any other key may be in any encoding."""
    listed = any(key.full_name == full_name and key.rule != IGNORED for key in KEYS)
    return listed or full_name.startswith(_READ_PREFIXES)


def as_integer(value: object) -> object:
    """An integer that was written as a float is that integer; anything else is itself."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_float(value: object) -> object:
    """A float that was written as an integer is that float; anything else is itself."""
    return float(value) if type(value) is int else value


def _same(value: object, neutral: object) -> bool:
    if type(value) is type(neutral):
        return value == neutral
    numbers = (int, float)
    return type(value) in numbers and type(neutral) in numbers and value == neutral


def as_markdown() -> str:
    """The table as ``docs/reference/metadata.md`` has it."""
    lines = ["| key | rule | meaning |", "|---|---|---|"]
    for key in KEYS:
        allowed = ", ".join(str(value) or "empty" for value in key.neutral)
        neutral = f" (allowed: {allowed})" if allowed else ""
        lines.append(f"| `{key.name.removeprefix('.')}` | {key.rule} | {key.words}{neutral} |")
    return "\n".join(lines) + "\n"


def hparam_error(key: str, problem: str) -> ModelFileError:
    return ModelFileError("E_HPARAM", f"{key} {problem}", name=key)


def check_integer(key: str, value: object, low: float, high: float) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise hparam_error(key, f"must be one integer, found {describe(value)}")
    if not low <= value <= high:
        raise hparam_error(key, f"is {value}; it must be from {low} to {high}")
    return value


def check_float(key: str, value: object, above: float, maximum: float) -> float:
    if not isinstance(value, float):
        raise hparam_error(key, f"must be one float, found {describe(value)}")
    if not above < value <= maximum:  # NaN is refused too
        ends = "" if math.isinf(above) else f", above {above:g}, at most {maximum:g}"
        raise hparam_error(key, f"is {value:g}; it must be finite{ends}")
    return value


def check_expert_width(metadata: Mapping[str, object], width: int, found: int, tensor: str) -> None:
    """Where the width of experts was derived, holds it against a tensor that shows it.

    Raises:
      ModelFileError: ``E_HPARAM`` naming the key that is missing.
    """
    key = PREFIX + "expert_feed_forward_length"
    if key not in metadata and width != found:
        raise hparam_error(
            key,
            f"is missing from the file, and feed_forward_length / expert_used_count is {width}, not the "
            f"{found} of {tensor}; convert the model again",
        )


def check_range(field: str, value: object) -> None:
    """Holds a field of the config against its key's range."""
    key = RANGES[field]
    check = check_float if isinstance(key.low, float) else check_integer
    check(key.full_name, value, key.low, key.high)


def describe(value: object) -> str:
    if isinstance(value, str):
        return f"the text {quote(value)}"
    if isinstance(value, bool | int | float):
        return f"{type(value).__name__} {value}"
    return "an array" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


class KeyReader:
    """Typed look-ups in the metadata; ranges are checked where values meet the config."""

    def __init__(self, metadata: Mapping[str, object]):
        self._metadata = metadata

    def get(self, name: str) -> object:
        return self._metadata.get(_BY_NAME[name].full_name)

    def need(self, name: str) -> object:
        value = self.get(name)
        if value is None:
            raise hparam_error(_BY_NAME[name].full_name, "is missing from the file; convert the model again")
        return value

    def integer(self, name: str) -> int:
        """One integer, a float that is one, or where llama.cpp takes it an array of equal ones."""
        key = _BY_NAME[name]
        value = as_integer(self._one_for_all(name, self.need(name)))
        return check_integer(key.full_name, value, key.low, key.high)

    def _one_for_all(self, name: str, value: object) -> object:
        """The value that an array gives every layer; anything but an array is itself.

        Raises:
          ModelFileError: ``E_HPARAM`` for an array of another length, or of values that differ.
        """
        if name not in _PER_LAYER or not isinstance(value, list):
            return value
        values: list[object] = value
        layers = self.integer("block_count")
        if len(values) != layers or any(v != values[0] for v in values):
            raise hparam_error(
                _BY_NAME[name].full_name,
                f"is an array; it must hold {layers} equal values, one per layer",
            )
        return values[0]

    def number(self, name: str, default: float | None = None) -> float:
        value = self.need(name) if default is None else self.get(name)
        if value is None and default is not None:
            return default
        return check_float(_BY_NAME[name].full_name, as_float(value), -math.inf, math.inf)

    def equal(self, name: str, expected: int, what: str) -> None:
        """An optional key that may only repeat what is known."""
        value, full_name = as_integer(self.get(name)), _BY_NAME[name].full_name
        if value is None:
            return
        if check_integer(full_name, value, -(2**63), 2**64) != expected:
            raise hparam_error(full_name, f"is {value}; it must equal {what}, {expected}")

    def refuse_other_computations(self, head_dim: int, context: int) -> None:
        """Refuses every key that asks for what is not computed here.

        Raises:
          ModelFileError: ``E_HPARAM`` naming the key.
        """
        for key in KEYS:
            value = self._metadata.get(key.full_name)
            if key.rule != REFUSED or value is None or self._is_neutral(key, value, head_dim, context):
                continue
            wanted = f"only {' or '.join(map(str, key.neutral))}" if key.neutral else "files without it"
            raise hparam_error(
                key.full_name, f"is {describe(value)}: {key.words}; Qwen3-MoE supports {wanted}"
            )

    @staticmethod
    def _is_neutral(key: Key, value: object, head_dim: int, context: int) -> bool:
        if key.name == "attention.scale" and isinstance(value, float):
            return value == 0.0 or math.isclose(value, head_dim**-0.5, rel_tol=1e-6)
        if key.name == "attention.sliding_window" and isinstance(value, int | float):
            return value == 0 or value >= context
        return any(_same(value, one) for one in key.neutral)

    def expert_width(self) -> int:
        """Width of one expert: a scalar, or an array that gives every layer the same."""
        name = "expert_feed_forward_length"
        return self._derived_expert_width() if self.get(name) is None else self.integer(name)

    def _derived_expert_width(self) -> int:
        key = _BY_NAME["feed_forward_length"]
        if self.get(key.name) is None:
            raise hparam_error(
                PREFIX + "expert_feed_forward_length", "is missing from the file; convert the model again"
            )
        used = self.integer("expert_used_count")
        value = as_integer(self._one_for_all(key.name, self.get(key.name)))
        dense = check_integer(key.full_name, value, 1, 2**20)
        if dense % used:
            raise hparam_error(
                key.full_name,
                f"is {dense}; without expert_feed_forward_length it must be a multiple of "
                f"expert_used_count, {used}",
            )
        return dense // used

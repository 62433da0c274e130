"""Every hyper-parameter is checked: what is missing, mistyped or out of range is refused by its key."""

import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.config import PRESETS, Qwen3MoeConfig, RopeScaling
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.metadata_keys import KEYS, REFUSED, as_markdown
from qwen3_moe_jax.testing.gguf_builder import TINY, model_metadata

NAN, INF = math.nan, math.inf
MISSING = object()

INTEGER_KEYS = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
)
PER_LAYER_KEYS = (
    "attention.head_count",
    "attention.head_count_kv",
    "expert_feed_forward_length",
    "expert_used_count",
)
FLOAT_KEYS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")

NO_INTEGERS = (MISSING, 0, -1, 2**31, 2**64 - 1, 4.5, NAN, INF, "4", True)
NO_FLOATS = (MISSING, 0.0, -1.0, NAN, INF, -INF, 1e30, 1, "1e-6", True, [1e-6])

RELATIONS = (
    ("block_count", 513),
    ("expert_count", 1025),
    ("context_length", 2**20 + 1),
    ("context_length", 1),  # a prompt of one token, and no place for another
    ("embedding_length", 2**16 + 1),
    ("attention.head_count", 1026),
    ("expert_feed_forward_length", 2**16 + 1),
    ("expert_used_count", 4),  # of 3 experts
    ("attention.head_count_kv", 3),  # does not divide 4
    ("attention.head_count_kv", 8),  # more than there are query heads
    ("attention.key_length", 1),
    ("attention.key_length", 1026),
    ("attention.value_length", 16),
    ("attention.value_length", "8"),
    ("attention.value_length", [8]),
    ("rope.dimension_count", 4),
    ("rope.dimension_count", -8),
    ("rope.dimension_count", 8.5),
    ("attention.head_count", [4]),  # 2 layers
    ("attention.head_count_kv", [2, 1]),
    ("vocab_size", 263),
    ("vocab_size", "264"),
    ("expert_feed_forward_length", []),
    ("expert_feed_forward_length", [32]),  # 2 layers
    ("expert_feed_forward_length", [32, 64]),
    ("expert_feed_forward_length", [0, 0]),
    ("expert_feed_forward_length", ["a", "a"]),
    ("expert_feed_forward_length", [NAN, NAN]),
    ("rope.freq_base", 1.0),
    ("attention.layer_norm_rms_epsilon", 0.5),
    ("expert_shared_count", 1),
    ("expert_shared_count", "0"),
    ("expert_shared_feed_forward_length", 512),
    ("leading_dense_block_count", 1),
    ("expert_group_count", 8),
    ("expert_gating_func", 2),  # sigmoid
    ("expert_gating_func", 1.5),
    ("expert_weights_norm", False),
    ("expert_weights_norm", 1),
    ("expert_weights_scale", 2.5),
    ("expert_weights_scale", NAN),
    ("attention.sliding_window", 16),
    ("attention.causal", False),
    ("attention.scale", 0.1),
    ("logit_scale", 16.0),
)

YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
ROPE_SCALING = (
    {"type": "longrope", "factor": 4.0},
    {"type": "dynamic", "factor": 4.0},
    {"type": "", "factor": 4.0},
    {"type": 1, "factor": 4.0},
    {"type": ["yarn"], "factor": 4.0},
    {"type": "linear"},
    {"type": "linear", "factor": 0.0},
    {"type": "linear", "factor": -2.0},
    {"type": "linear", "factor": NAN},
    {"type": "linear", "factor": INF},
    {"type": "linear", "factor": [4]},
    {"type": "linear", "factor": 1e9},
    {"factor": "4"},
    {"type": "yarn", "factor": 4.0},  # no original_context_length
    {"type": "yarn", "original_context_length": 64},
    YARN | {"factor": 0.5},
    YARN | {"factor": 0.0},
    YARN | {"factor": -1.0},
    YARN | {"factor": NAN},
    YARN | {"original_context_length": 0},
    YARN | {"original_context_length": -1},
    YARN | {"original_context_length": 2**20 + 1},
    YARN | {"original_context_length": 64.5},
    YARN | {"original_context_length": [64]},
    YARN | {"attn_factor": 0.0},
    YARN | {"attn_factor": NAN},
    YARN | {"attn_factor": -1.0},
    YARN | {"attn_factor": True},
    YARN | {"attn_factor": "1"},
    YARN | {"yarn_beta_fast": 0.0},
    YARN | {"yarn_beta_fast": NAN},
    YARN | {"yarn_beta_fast": 0.5},  # below beta_slow
    YARN | {"yarn_beta_fast": "32"},
    YARN | {"yarn_beta_slow": -1.0},
    YARN | {"yarn_beta_slow": INF},
    YARN | {"yarn_beta_slow": 33.0},
    YARN | {"yarn_ext_factor": 0.5},
    YARN | {"yarn_attn_factor": 2.0},
    YARN | {"yarn_log_multiplier": 0.1},
    {"attn_factor": 2.0},  # without a type
    {"type": "none", "attn_factor": 2.0},
)

BAD_VALUES = (
    [(key, value) for key in INTEGER_KEYS for value in NO_INTEGERS]
    + [(key, [4, 4]) for key in INTEGER_KEYS if key not in PER_LAYER_KEYS]
    + [(key, value) for key in FLOAT_KEYS for value in NO_FLOATS]
    + list(RELATIONS)
)


def read(metadata: dict[str, object], vocab_size: int = TINY.vocab_size) -> Qwen3MoeConfig:
    return Qwen3MoeConfig.from_metadata(metadata, tie_word_embeddings=False, vocab_size=vocab_size)


def with_values(values: dict[str, object]) -> dict[str, object]:
    metadata = model_metadata() | {f"qwen3moe.{key}": value for key, value in values.items()}
    return {key: value for key, value in metadata.items() if value is not MISSING}


def scaling(values: dict[str, object]) -> dict[str, object]:
    return with_values({f"rope.scaling.{key}": value for key, value in values.items()})


def test_there_are_enough_bad_values():
    assert len(BAD_VALUES) + len(ROPE_SCALING) >= 120


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_bad_value_is_refused_by_its_key(key: str, value: object):
    with pytest.raises(ModelFileError) as caught:
        read(with_values({key: value}))
    assert caught.value.code == "E_HPARAM"
    assert caught.value.name == f"qwen3moe.{key}"
    assert f"qwen3moe.{key}" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("values", ROPE_SCALING)
def test_bad_rope_scaling_is_refused(values: dict[str, object]):
    with pytest.raises(ModelFileError) as caught:
        read(scaling(values))
    assert caught.value.code == "E_HPARAM"
    assert caught.value.name.startswith("qwen3moe.rope.scaling.")


@pytest.mark.parametrize("kind", ["longrope", "", 5])
def test_an_unknown_kind_of_scaling_is_named_before_a_factor_that_is_missing(kind: object):
    with pytest.raises(ModelFileError, match=r"rope\.scaling\.type is .*; supported: none, linear, yarn"):
        read(scaling({"type": kind}))


def test_a_number_that_is_not_finite_is_not_measured_by_infinite_ends():
    with pytest.raises(ModelFileError, match=r"rope\.freq_base is nan; it must be finite$"):
        read(model_metadata() | {"qwen3moe.rope.freq_base": NAN})


@pytest.mark.parametrize("vocab_size", [0, -1, 2**20 + 1])
def test_bad_vocabulary_size(vocab_size: int):
    with pytest.raises(ModelFileError, match="vocab_size"):
        read(model_metadata(), vocab_size)


@pytest.mark.parametrize(
    "found", ["llama", "qwen3", "qwen2moe", "clip", "", "QWEN3MOE", 3, None, ["qwen3moe"]]
)
def test_wrong_architecture_names_both(found: object):
    metadata = model_metadata() | {"general.architecture": found}
    if found is None:
        del metadata["general.architecture"]
    with pytest.raises(ModelFileError) as caught:
        read(metadata)
    assert caught.value.code == "E_ARCH"
    assert "'qwen3moe'" in str(caught.value)
    if isinstance(found, str):
        assert f"'{found}'" in str(caught.value)


def test_architecture_is_judged_first():
    with pytest.raises(ModelFileError, match="E_ARCH"):
        read({"general.architecture": "llama"})


def test_values_arrive():
    assert read(model_metadata()) == TINY


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"block_count": 2.0, "attention.key_length": 8.0, "rope.dimension_count": 8.0}, TINY),
        ({"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2.0]}, TINY),
        ({"expert_used_count": [2, 2], "expert_feed_forward_length": 32.0}, TINY),
        ({"expert_weights_scale": 1, "attention.scale": 0, "expert_gating_func": 1.0}, TINY),
        ({"attention.sliding_window": 0.0}, TINY),
        ({"rope.freq_base": 5000000}, replace(TINY, rope_theta=5e6)),
        (
            {"rope.scaling.factor": 4, "rope.scaling.original_context_length": 64.0},
            replace(TINY, rope_scaling=RopeScaling("linear", 4.0, 64)),
        ),
    ],
)
def test_numbers_of_the_other_kind_and_arrays_of_equal_ones(values, expected):
    assert read(with_values(values)) == expected


def test_odd_head_dim_is_refused():
    with pytest.raises(ModelFileError, match="key_length is 7; rotary positions need an even number"):
        read(with_values({"attention.key_length": 7, "attention.value_length": 7}))


def test_tied_output_and_vocabulary_come_from_the_tensors():
    config = Qwen3MoeConfig.from_metadata(model_metadata(), tie_word_embeddings=True, vocab_size=300)
    assert config == replace(TINY, tie_word_embeddings=True, vocab_size=300)


@pytest.mark.parametrize("key", ["attention.value_length", "rope.dimension_count"])
def test_optional_keys(key: str):
    assert read(with_values({key: MISSING})) == TINY
    assert read(with_values({key: TINY.head_dim})) == TINY


@pytest.mark.parametrize(
    ("values", "width"),
    [
        ({"expert_feed_forward_length": [32, 32]}, 32),
        ({"expert_feed_forward_length": MISSING, "feed_forward_length": 128}, 64),
        ({"feed_forward_length": [1, 2]}, 32),  # unused, so not judged
    ],
)
def test_expert_width(values: dict[str, object], width: int):
    assert read(with_values(values)).moe_intermediate_size == width


@pytest.mark.parametrize("dense", [MISSING, 0, 127, "128", [128, 64]])
def test_expert_width_cannot_be_derived(dense: object):
    with pytest.raises(ModelFileError, match="feed_forward_length"):
        read(with_values({"expert_feed_forward_length": MISSING, "feed_forward_length": dense}))


@pytest.mark.parametrize(
    "values",
    [
        {"expert_shared_count": 0},
        {"expert_gating_func": 1},
        {"expert_weights_norm": True},
        {"expert_weights_scale": 1.0},
        {"attention.sliding_window": 0},
        {"attention.sliding_window": TINY.max_position_embeddings},
        {"attention.scale": TINY.head_dim**-0.5},
        {"some.new_key": 3},
        {"rope.scaling.finetuned": True},
        {"rope.scaling.yarn_ext_factor": 1.0},
    ],
)
def test_keys_that_change_nothing(values: dict[str, object]):
    assert read(with_values(values)) == TINY


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"type": "none"},
        {"type": "none", "factor": 4.0},
        {"type": "linear", "factor": 1.0},
        {"factor": 1.0},
        {"attn_factor": 1.0},
    ],
)
def test_no_rope_scaling(values: dict[str, object]):
    assert read(scaling(values)).rope_scaling is None


REFUSED_KEYS = [key for key in KEYS if key.rule == REFUSED]


@pytest.mark.parametrize("key", REFUSED_KEYS, ids=lambda key: key.name)
def test_what_changes_the_computation_is_refused_by_its_key(key):
    for value in (7, 0.37, "other", [1, 2], NAN):
        with pytest.raises(ModelFileError) as caught:
            read(model_metadata() | {key.full_name: value})
        assert (caught.value.code, caught.value.name) == ("E_HPARAM", key.full_name)
    for value in key.neutral:
        assert read(model_metadata() | {key.full_name: value}) == TINY


def test_keys_stand_once_in_the_table_and_in_the_docs():
    assert len({key.name for key in KEYS}) == len(KEYS)
    page = Path(__file__).parents[2] / "docs" / "reference" / "metadata.md"
    assert as_markdown() in page.read_text()


def test_an_older_name_of_the_factor():
    expected = RopeScaling("linear", 4.0, TINY.max_position_embeddings)
    assert read(with_values({"rope.scale_linear": 4.0})).rope_scaling == expected
    assert read(with_values({"rope.scale_linear": 1.0})) == TINY
    both = {"rope.scale_linear": 8.0, "rope.scaling.factor": 4.0}
    assert read(with_values(both)).rope_scaling == expected
    for value in (0.0, -1.0, NAN, "4", [4.0]):
        with pytest.raises(ModelFileError):
            read(with_values({"rope.scale_linear": value}))


def test_linear_rope_scaling():
    expected = RopeScaling("linear", 4.0, TINY.max_position_embeddings)
    assert read(scaling({"type": "linear", "factor": 4.0})).rope_scaling == expected
    assert read(scaling({"factor": 4.0})).rope_scaling == expected
    scaled = read(scaling({"factor": 4.0, "attn_factor": 1.5})).rope_scaling
    assert scaled == replace(expected, attention_factor=1.5)


def test_yarn():
    assert read(scaling(YARN)).rope_scaling == RopeScaling("yarn", 4.0, 64, None, 32.0, 1.0)
    ramp = read(scaling(YARN | {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0})).rope_scaling
    assert (ramp.beta_fast, ramp.beta_slow) == (16.0, 2.0)


def test_yarn_attention_factor_multiplies_the_usual_magnitude():
    found = read(scaling(YARN | {"attn_factor": 1.5})).rope_scaling.attention_factor
    assert found == pytest.approx(1.5 * (0.1 * math.log(4.0) + 1.0), rel=1e-12)


def test_presets():
    sizes = {
        name: (
            c.num_hidden_layers,
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.num_experts,
        )
        for name, c in PRESETS.items()
    }
    assert sizes == {
        "Qwen3-30B-A3B": (48, 2048, 32, 4, 128),
        "Qwen3-Coder-30B-A3B": (48, 2048, 32, 4, 128),
        "Qwen3-235B-A22B": (94, 4096, 64, 4, 128),
        "Qwen3-Coder-480B-A35B": (62, 6144, 96, 8, 160),
    }
    thetas = [c.rope_theta for c in PRESETS.values()]
    assert thetas == [1e6, 1e7, 1e6, 1e7]
    for config in PRESETS.values():
        assert read(model_metadata(config), config.vocab_size) == config


def test_config_made_by_hand_is_checked_too():
    with pytest.raises(ModelFileError, match="expert_used_count"):
        replace(TINY, num_experts_per_tok=4)


def test_error_survives_a_process_boundary():
    error = ModelFileError("E_HPARAM", "a line\nand another", name="k", offset=7)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.name, copy.offset, str(copy)) == ("E_HPARAM", "k", 7, str(error))
    assert str(error) == "E_HPARAM: a line\\nand another (at byte 7)"

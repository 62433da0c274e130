"""Every sampling parameter is checked by name; defaults come from the file or the family."""

from dataclasses import fields, replace

import numpy as np
import pytest

from qwen3_moe_jax.core.sampling import CODER, NON_THINKING, THINKING, Sampling, recommended_sampling

BAD = {
    "repetition_penalty": (0, -1, 0.001, 101),
    "presence_penalty": (-101, 101),
    "temperature": (-0.1, 1e-9, 1e-4, 101),
    "top_k": (-1, 2**31, 1.5, 20.0),
    "top_p": (0, -0.1, 1.01),
    "min_p": (-0.1, 1.01),
    "seed": (-1, 2**32, 0.5),
}
ALWAYS_BAD = (float("nan"), float("inf"), -float("inf"), "1", None, True, [1])


def test_every_field_is_covered():
    assert set(BAD) == {field.name for field in fields(Sampling)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in BAD for value in (*BAD[name], *ALWAYS_BAD)]
)
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0), ("temperature", 1e-3), ("temperature", 100), ("seed", 0),
        ("top_k", 0), ("top_k", 1), ("top_p", 1),
        ("top_p", 1e-6), ("min_p", 0), ("min_p", 1), ("presence_penalty", -2.0), ("repetition_penalty", 1.05),
        ("seed", 2**32 - 1), ("top_k", np.int32(20)), ("temperature", np.float32(0.5)),
    ],
)  # fmt: skip
def test_good_values(name, value):
    assert getattr(Sampling(**{name: value}), name) == value


SWITCH = {"tokenizer.chat_template": "{% if enable_thinking is defined %}"}


@pytest.mark.parametrize(
    ("metadata", "thinking", "expected", "origin"),
    [
        ({}, None, NON_THINKING, "without thinking"),
        ({"general.name": "Qwen3 30B A3B Instruct 2507"}, None, NON_THINKING, "without thinking"),
        ({"general.name": "Qwen3-30B-A3B-Thinking-2507"}, None, THINKING, "Qwen3 thinking"),
        (
            {"general.basename": "Qwen3", "general.finetune": "Thinking-2507"},
            None,
            THINKING,
            "Qwen3 thinking",
        ),
        ({"general.name": "Qwen3 30B A3B"} | SWITCH, None, THINKING, "Qwen3 thinking"),
        ({"general.name": "Qwen3 30B A3B"} | SWITCH, False, NON_THINKING, "without thinking"),
        ({"general.name": "Qwen3 30B A3B"} | SWITCH, True, THINKING, "Qwen3 thinking"),
        ({"general.name": "Qwen3 30B A3B Base"} | SWITCH, None, NON_THINKING, "without thinking"),
        ({"general.name": "Qwen3-Coder-30B-A3B-Instruct"}, None, CODER, "Qwen3-Coder"),
        ({"tokenizer.chat_template": "<function="}, None, CODER, "Qwen3-Coder"),
    ],
)
def test_the_familys_recommendation(metadata, thinking, expected, origin):
    sampling, source = recommended_sampling(metadata, thinking=thinking)
    assert sampling == expected
    assert source.startswith("recommended for")
    assert origin in source


def test_the_real_templates_name_their_family(templates):
    def of(name: str) -> Sampling:
        return recommended_sampling({"tokenizer.chat_template": templates[name]})[0]

    assert of("Qwen3") == THINKING
    assert of("Qwen3-Coder") == CODER


def test_the_file_goes_before_the_family():
    as_float32 = float(np.float32(0.7))
    metadata = {
        "general.sampling.temp": as_float32,
        "general.sampling.top_k": 40,
        "general.sampling.top_p": 1.0,
    }
    sampling, source = recommended_sampling(metadata, thinking=True)
    assert sampling == Sampling(temperature=0.7, top_k=40, top_p=1.0)
    assert source == "the file's general.sampling (temp, top_k, top_p)"


def test_what_the_file_leaves_out_comes_from_the_family():
    sampling, source = recommended_sampling(
        {"general.sampling.penalty_repeat": 1.5, "general.sampling.mirostat": 2}
    )
    assert sampling == Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.5)
    assert (
        source == "the file's general.sampling (penalty_repeat), else recommended for Qwen3 without thinking"
    )


NONSENSE = [
    ("temp", float("nan")),
    ("temp", float("inf")),
    ("temp", 1e-4),
    ("temp", -1.0),
    ("temp", "hot\nforged: line"),
    ("temp", True),
    ("temp", [0.7]),
    ("top_p", 0.0),
    ("top_p", 1e30),
    ("min_p", -0.5),
    ("penalty_repeat", 0.0),
    ("penalty_repeat", float("-inf")),
    ("top_k", 2**40),
    ("top_k", 1.5),
    ("top_k", ["a"] * 10_000),
]


@pytest.mark.parametrize(("key", "value"), NONSENSE, ids=lambda v: str(v)[:12])
def test_a_file_that_recommends_nonsense_stops_nobody(key, value):
    given = {"general.sampling.min_p": 0.1} if key != "min_p" else {"general.sampling.top_k": 7}
    sampling, source = recommended_sampling({f"general.sampling.{key}": value, **given})
    expected = replace(NON_THINKING, **({"min_p": 0.1} if key != "min_p" else {"top_k": 7}))
    assert sampling == expected
    assert f"the file's {key} " in source
    assert "is not usable" in source
    assert source.isprintable()
    assert len(source) < 300


@pytest.mark.parametrize("value", [-1, 0, -(2**40)])
def test_a_top_k_below_one_is_every_token(value):
    sampling, source = recommended_sampling({"general.sampling.top_k": value})
    assert sampling == replace(NON_THINKING, top_k=0)
    assert "not usable" not in source

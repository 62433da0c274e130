"""Values from Python that are no counts or no lists: refused by name, before any work."""

import numpy as np
import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax.core.sampling import Sampling

GREEDY = Sampling(temperature=0)
NOT_COUNTS = [True, "64", 64.0, float("nan"), np.float32(64)]


@pytest.fixture(scope="module")
def model():
    with q3.load(backend="reference", gate=False, max_context=64) as found:
        yield found


@pytest.mark.parametrize("value", NOT_COUNTS, ids=repr)
def test_a_context_that_is_no_integer_is_named(value):
    with pytest.raises(ValueError, match="max_context must be an integer"):
        q3.load(backend="reference", gate=False, max_context=value)


@pytest.mark.parametrize("value", NOT_COUNTS, ids=repr)
def test_max_tokens_that_is_no_integer_is_named(model, value):
    with pytest.raises(ValueError, match="max_tokens must be an integer"):
        model.generate("x", max_tokens=value, sampling=GREEDY)


def test_none_is_no_stop_and_an_integer_of_numpy_is_one(model):
    text = model.generate("x", max_tokens=2, sampling=GREEDY)
    assert model.generate("x", max_tokens=np.int64(2), sampling=GREEDY, stop=None) == text


@pytest.mark.parametrize("prompts", ["x = 1", b"x = 1"])
def test_one_text_is_no_list_of_prompts(model, prompts):
    with pytest.raises(ValueError, match="give a list of prompts"):
        model.generate_batch(prompts, max_tokens=1, sampling=GREEDY)

"""Values from Python of a wrong kind: refused in one line that names them, before any work."""

import copy
import pickle

import numpy as np
import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax.core.errors import KindError
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


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
def test_a_model_that_is_copied_says_what_to_do(model, duplicate):
    with pytest.raises(TypeError, match="cannot be copied or pickled: share it, or load it in each process"):
        duplicate(model)


def one_line(error: pytest.ExceptionInfo[Exception], words: str) -> None:
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("path", [3, 1.5, b"x", [], {}, True, object()], ids=lambda v: type(v).__name__)
def test_a_model_that_is_no_path_is_named(path):
    with pytest.raises(TypeError) as caught:
        q3.load(path)
    one_line(caught, "the model's path must be a text or a path, not ")


def test_a_path_of_bytes_is_a_path(tmp_path):
    class Odd:
        def __fspath__(self) -> bytes:
            return b"/no/such.gguf"

    with pytest.raises(q3.ModelFileError, match="/no/such.gguf"):
        q3.load(Odd())


LOADS = [
    ({"gate": "no"}, "gate must be True or False, not 'no'"),
    ({"strict": 1}, "strict must be True or False, not 1"),
    ({"adapter": 3}, "adapter must be a text, not 3"),
    ({"progress": 3}, "progress must be a function, True or False, not 3"),
    ({"before_weights": 3}, "before_weights must be a function, not 3"),
    ({"distributed": True}, "distributed must be a Processes, not True"),
    ({"distributed": "a:1"}, "distributed must be a Processes, not 'a:1'"),
    ({"first_prompt": "64"}, "first_prompt must be an integer, not '64'"),
    ({"first_prompt": 1.5}, "first_prompt must be an integer, not 1.5"),
]


@pytest.mark.parametrize(("options", "words"), LOADS, ids=lambda v: "" if isinstance(v, dict) else v)
def test_an_option_of_load_is_named(options, words):
    with pytest.raises(KindError) as caught:
        q3.load(backend="reference", **options)
    one_line(caught, words)


CALLS = {
    "a prompt must be a text or a list of messages, not 3": lambda m: m.generate(3),
    "a prompt must be a text or a list of messages, not None": lambda m: m.generate(None),
    "a prompt must be a text or a list of messages, not b'x'": lambda m: m.trace(b"x"),
    "a prompt must be a text or a list of messages, not 4": lambda m: m.experts(4),
    "a prompt must be a text or a list of messages, not 5": lambda m: m.bisect(5),
    "stop must be a list, not 3": lambda m: m.generate("x", stop=3),
    "stop must be a list, not {'x': 1}": lambda m: m.generate("x", stop={"x": 1}),
    "stop must be a list, not b'x'": lambda m: m.generate("x", stop=b"x"),
    "sampling must be a Sampling, not 3": lambda m: m.generate("x", sampling=3),
    "sampling must be a Sampling, not {}": lambda m: m.generate_batch(["x"], sampling={}),
    "tools must be a list, not 3": lambda m: m.generate("x", tools=3),
    "tools must be a list, not {'a': 1}": lambda m: m.generate("x", tools={"a": 1}),
    "thinking must be True or False, not 'off'": lambda m: m.generate("x", thinking="off"),
    "special must be True or False, not 3": lambda m: m.generate("x", special=3),
    "prefill must be a text, not None": lambda m: m.generate("x", prefill=None),
    "prompts must be a list, not 3": lambda m: m.generate_batch(3),
    "prompts must be a list, not None": lambda m: m.generate_batch(None),
    "prompts must be a list, not {'a': 1}": lambda m: m.generate_batch({"a": 1}),
    "a prompt must be a text or a list of messages, not 6": lambda m: m.generate_batch(["x", 6]),
    "capture must be a list, not 'Qcur'": lambda m: m.forward([1], capture="Qcur"),
    "stages must be a list, not 'l_out'": lambda m: m.trace("x", "l_out"),
    "layers must be a list, not 3": lambda m: m.forward([1], layers=3),
    "layers must be some of 0 to 5, not [True]": lambda m: m.forward([1], layers=[True]),
    "chunk_sizes must be a list, not 3": lambda m: m.forward([1], chunk_sizes=3),
    "a size of chunk_sizes must be an integer, not 1.5": lambda m: m.forward([1], chunk_sizes=[1.5]),
    "expert_ids must be integers, not float64": lambda m: m.forward([1], expert_ids=np.zeros((6, 1, 4))),
    "token_ids must be a non-empty list of integers": lambda m: m.logits("x"),
    "text must be a text, not 3": lambda m: m.perplexity(3),
    "context must be an integer, not 'x'": lambda m: m.perplexity("x", context="x"),
    "stride must be an integer, not 1.5": lambda m: m.perplexity("x", stride=1.5),
    "window must be an integer, not 'x'": lambda m: m.experts("x", window="x"),
    "window is 0; it must be at least 1": lambda m: m.experts("x", window=0),
    "clauses must be a list, not 'TEXT-001'": lambda m: m.verify(clauses="TEXT-001"),
    "text_tokens must be an integer, not 'x'": lambda m: m.verify(text_tokens="x"),
    "expert must be an integer, not 'x'": lambda m: q3.ablate_expert("x"),
    "experts must be a list, not 3": lambda m: q3.force_experts(3),
    "an expert must be an integer, not 1.5": lambda m: q3.force_experts([1.5]),
    "no stage is named 3": lambda m: q3.steer(3, np.zeros(1)),
}


@pytest.mark.parametrize("words", CALLS)
def test_an_argument_of_a_wrong_kind_is_named(model, words):
    with pytest.raises(ValueError, match="^") as caught:
        CALLS[words](model)
    one_line(caught, words)


def test_an_option_that_there_is_not_is_a_type_error_with_a_guess(model):
    with pytest.raises(TypeError, match="there is no option 'max_token'; did you mean 'max_tokens'"):
        model.generate("x", max_token=1)
    with pytest.raises(TypeError, match="there is no option 'reuse'"):
        model.generate_batch(["x"], reuse=True)


INTERVENTIONS = {
    "there is no expert 16: this model has 0 to 15": lambda: q3.ablate_expert(16),
    "there is no expert -1: this model has 0 to 15": lambda: q3.force_experts([0, 1, 2, -1]),
    "an intervention's layer must be 0 to 5, not 6": lambda: q3.ablate_expert(1, layer=6),
    "an intervention must be an Intervention, not 3": lambda: 3,
    "no stage is named 'l_uot'": lambda: q3.Intervention("l_uot", lambda x: x),
}


@pytest.mark.parametrize("words", INTERVENTIONS)
def test_an_intervention_that_would_change_nothing_is_named(jax_runner, words):
    with pytest.raises(ValueError, match="^") as caught:
        jax_runner.forward([1, 2], interventions=(INTERVENTIONS[words](),))
    one_line(caught, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token": 4096}, "token must be 0 to 4095, not 4096"),
        ({"token": -1}, "token must be 0 to 4095, not -1"),
        ({"token": "x"}, "token must be an integer, not 'x'"),
        ({"token": 1, "position": 2}, "position must be -2 to 1, not 2"),
    ],
)
def test_a_logit_that_is_not_there_has_no_gradient(jax_runner, options, words):
    from qwen3_moe_jax.inspection.interventions import logit_gradient

    with pytest.raises(ValueError, match="^") as caught:
        logit_gradient(jax_runner, [1, 2], stage="l_out", layer=0, **options)
    one_line(caught, words)

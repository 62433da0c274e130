"""Each backend keeps the ``Runner`` protocol: the same calls, the same refusals."""

import inspect
from typing import get_type_hints

import numpy as np
import pytest

from qwen3_moe_jax.core import batch
from qwen3_moe_jax.core.errors import BackendUnavailableError, ContextOverflowError
from qwen3_moe_jax.core.one_at_a_time import (
    OneAtATime,
)
from qwen3_moe_jax.core.runner import (
    Capabilities,
    ForwardOptions,
    Runner,
)
from qwen3_moe_jax.core.runner_arguments import (
    checked_forward,
)
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.batching import Batch
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.serve.engine.single import SingleBatch
from qwen3_moe_jax.wgpu_backend.runner import WgpuRunner
from tests.tolerances import TOKEN_SCORES

BACKENDS = (JaxRunner, WgpuRunner, ReferenceRunner)
MEMBERS = {name: value for name, value in vars(Runner).items() if not name.startswith("_")}
METHODS = {name for name, value in MEMBERS.items() if inspect.isfunction(value)}
SET_IN_INIT = {"config", "max_context", "is_closed"}


def parameters(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_has_the_protocols_parameters(backend, name):
    assert parameters(getattr(backend, name)) == parameters(MEMBERS[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_attribute_is_there(backend):
    for name in MEMBERS.keys() - METHODS - SET_IN_INIT:
        assert hasattr(backend, name), name
    assert isinstance(backend.capabilities, Capabilities)
    assert isinstance(backend.name, str)


def test_attributes_of_loaded_backends(jax_runner, reference_runner):
    for runner in (jax_runner, reference_runner):
        assert all(hasattr(runner, name) for name in MEMBERS)
        assert not runner.is_closed
        assert runner.cache_nbytes > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_backend_can_is_what_it_overrides(backend):
    can = backend.capabilities
    for name in ("open_batch", "dequantized"):
        inherits = getattr(backend, name) is getattr(OneAtATime, name)
        assert getattr(can, name) != inherits, name
    for name in ("set_max_context", "free_nbytes"):  # caches that are made when they are needed
        inherits = getattr(backend, name) is getattr(OneAtATime, name)
        assert can.open_batch != inherits, name


def test_options_are_those_of_the_check():
    checked = set(inspect.signature(checked_forward).parameters) - {"runner", "token_ids"}
    assert checked == get_type_hints(ForwardOptions).keys()


REFUSED = {
    "no stage is named 'l_outt'": {"capture": ("l_outt",)},
    "layers must be some of 0 to": {"layers": (0, 99)},
    "layers must be some of 0 to .* not \\[\\]": {"layers": ()},
    "a size of chunk_sizes is 0": {"chunk_sizes": (4, 0)},
    "expected \\[L, T, X\\]": {"expert_ids": np.zeros((1, 1, 1), np.int32)},
    "token id 999999 is not in 0..": {"token_ids": [1, 999999]},
    "token id -1 is not in 0..": {"token_ids": [-1]},
    "non-empty list of integers": {"token_ids": []},
    "a non-empty list": {"token_ids": [[1, 2]]},
    "list of integers": {"token_ids": [1.5]},
}


@pytest.fixture(params=["jax", "reference"])
def runner(request) -> Runner:
    return request.getfixturevalue(f"{request.param}_runner")


@pytest.mark.parametrize("message", REFUSED)
def test_every_backend_refuses_the_same_arguments(runner, message):
    options = {"token_ids": [1, 2], **REFUSED[message]}
    with pytest.raises(ValueError, match=message):
        runner.forward(**options)


def test_too_many_tokens(runner):
    for call in (runner.forward, runner.log_likelihoods):
        with pytest.raises(ContextOverflowError, match="raise max_context"):
            call([1] * (runner.max_context + 1))
    with pytest.raises(ContextOverflowError):
        runner.stream([1] * runner.max_context, max_tokens=1, sampling=Sampling())


@pytest.mark.parametrize("first", [0, -1, 2, 9])
def test_likelihoods_of_no_token_are_refused(runner, first):
    with pytest.raises(ValueError, match=f"first is {first}"):
        runner.log_likelihoods([1, 2], first=first)


def test_what_the_reference_cannot_do_it_says(reference_runner):
    with pytest.raises(ValueError, match="reference backend takes no other sequences beside"):
        reference_runner.forward([1], beside=[[2]])
    with pytest.raises(ValueError, match="takes no interventions"):
        reference_runner.forward([1], interventions=[object()])
    with pytest.raises(BackendUnavailableError, match="one sequence at a time"):
        reference_runner.open_batch(2)
    with pytest.raises(TypeError):
        reference_runner.forward([1], unknown=1)


def test_several_prompts_are_answered_alike(jax_runner, reference_runner):
    prompts, sampling = [[1, 2, 3], [5]], Sampling(temperature=0)
    ask = {"max_tokens": [3, 5], "sampling": sampling, "is_over": lambda number, tokens: number == 1}
    of_jax, of_reference = (r.generate_batch(prompts, **ask) for r in (jax_runner, reference_runner))
    assert of_reference == of_jax
    assert [r.finish_reason for r in of_reference] == ["length", "stop"]
    with pytest.raises(ValueError, match="2 prompts, 1 max_tokens"):
        reference_runner.generate_batch(prompts, max_tokens=[3], sampling=sampling)


def test_scores_of_tokens_and_their_rivals(reference_runner, exact_runner):
    ids = [5, 9, 70, 11]
    of_all, of_jax = (r.token_scores(ids, top=3, first=2) for r in (reference_runner, exact_runner))
    assert [s.logprob for s in of_all] == pytest.approx(reference_runner.log_likelihoods(ids, first=2))
    for ours, theirs in zip(of_all, of_jax, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=TOKEN_SCORES)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert len(ours.top) == 3


def test_the_time_of_compilation_is_told_without_counting_programs(jax_runner, monkeypatch):
    """Counting takes milliseconds, in which a small model writes a dozen tokens; rates ask for the time."""
    monkeypatch.setattr(type(jax_runner.preparation), "made", property(lambda _: pytest.fail("counted")))
    assert jax_runner.compilation().seconds >= 0


def test_a_backend_tells_of_programs_if_it_compiles_while_it_runs(reference_runner, jax_runner):
    assert reference_runner.compilation() is None
    told = jax_runner.compilation()
    assert 0 <= told.count_ready() <= told.wanted
    assert not told.is_waiting


@pytest.mark.parametrize(
    ("kind", "protocol"), [(Batch, batch.Batch), (Batch, batch.RowBatch), (SingleBatch, batch.Batch)]
)
def test_a_batch_keeps_its_protocol(kind, protocol):
    for name, value in vars(protocol).items():
        if isinstance(value, property) and name not in {"slots", "capacity"}:  # these are set by __init__
            assert hasattr(kind, name), name
        if inspect.isfunction(value) and not name.startswith("_"):
            ours, wanted = parameters(getattr(kind, name)), parameters(value)
            assert ours[: len(wanted)] == wanted, name


def test_a_batch_of_one_has_no_rows_and_masks(reference_runner):
    one = SingleBatch(reference_runner, 64)
    for ask in ({"mask": b""}, {"filled": 1}):
        with pytest.raises(BackendUnavailableError, match="no rows and masks"):
            one.admit([1, 2], **ask)
    with pytest.raises(BackendUnavailableError, match="no rows and masks"):
        one.copy_row(0, 0, 1)
    with pytest.raises(BackendUnavailableError, match="when it loads"):
        reference_runner.set_max_context(4)

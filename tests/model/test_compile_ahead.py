"""Programs that are compiled while weights are read are those that run."""

from contextlib import contextmanager

import jax
import pytest

from qwen3_moe_jax import params
from qwen3_moe_jax.compile_ahead import CompileAhead
from qwen3_moe_jax.jax_runner import JaxRunner
from qwen3_moe_jax.sampling import Sampling

CONTEXT = 83
"""Of no other test: nothing of these shapes has been compiled in this process."""

TRACED = "/jax/core/compile/jaxpr_trace_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
COMPILATIONS = {(COMPILED, "jit(prefill)"), (COMPILED, "jit(decode)")}


@contextmanager
def compilations():
    """(event, function) of everything that is traced or compiled, as it comes."""
    events = []
    listen = lambda event, duration, fun_name="", **_: events.append((event, fun_name))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("placer", [params._OnHost, params._OnDevice], ids=["cpu", "gpu"])
@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_a_first_answer_compiles_nothing(source, cache_dtype, placer, monkeypatch):
    monkeypatch.setattr(params, "_OnHost", placer)
    with compilations() as events:
        runner = JaxRunner(source, max_context=CONTEXT, cache_dtype=cache_dtype, compile_ahead=True)
        runner._ahead.wait()
        assert {(TRACED, "prefill"), (TRACED, "decode"), *COMPILATIONS} <= set(events)
        batch = runner._new_batch(1, CONTEXT)
        batch.admit([1, 2, 3], max_tokens=3)
        events.clear()
        written = [token for _ in range(3) for progress in batch.step(1) for token in progress.tokens]
        assert len(written) == 3
        assert not set(events) & {(TRACED, "prefill"), (TRACED, "decode"), *COMPILATIONS}


def test_what_cannot_be_compiled_says_so_where_it_is_called(source, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no memory for this program")

    monkeypatch.setattr("qwen3_moe_jax.generate.decode", fails)
    monkeypatch.setattr(fails, "lower", fails, raising=False)
    runner = JaxRunner(source, max_context=CONTEXT + 1, compile_ahead=True)
    assert isinstance(runner._ahead, CompileAhead)
    with pytest.raises(RuntimeError, match="no memory for this program"):
        list(runner.stream([1, 2, 3], max_tokens=3, sampling=Sampling(temperature=0)))

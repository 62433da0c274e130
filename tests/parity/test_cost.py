"""What verify may cost: programs are compiled once, not again for every chunk, request or weight."""

from contextlib import contextmanager

import jax
import pytest

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.runner import JaxRunner

PROGRAMS = {"jit(forward_chunk)", "jit(prefill_chunk)", "jit(generate)"}


@contextmanager
def counted_compilations():
    """Names of the model's programs that XLA compiled, or read from its cache, in a block."""
    names: list[str] = []

    def listen(name: str, _seconds: float, **facts) -> None:
        if name.endswith("backend_compile_duration") and facts["fun_name"] in PROGRAMS:
            names.append(facts["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def runner(source):
    return JaxRunner(source, max_context=96)


def test_every_chunk_of_a_prompt_takes_the_first_ones_program(runner, text_ids):
    runner.forward(text_ids[:16], chunk_sizes=(16,))
    with counted_compilations() as compiled:
        runner.forward(text_ids[:64], chunk_sizes=(16,))
    assert not compiled


def test_a_second_request_takes_the_first_ones_programs(runner, text_ids):
    def write():
        return list(runner.stream(text_ids[:9].tolist(), max_tokens=4, sampling=Sampling(temperature=0)))

    first = write()
    with counted_compilations() as compiled:
        assert write() == first
    assert not compiled

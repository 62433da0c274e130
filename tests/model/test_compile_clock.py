"""What an interrupted person is told to wait for, when several threads compile at once."""

import sys
import threading

import pytest

from qwen3_moe_jax.jax_backend.compile_clock import CompileClock, in_background

EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def fine_switches():
    """Threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_steps_of_several_threads_all_end(fine_switches):
    clock = CompileClock()
    started = threading.Barrier(4)

    def compile_often():
        started.wait()
        for i in range(5_000):
            clock.began(EVENT, i)
            clock.ended(EVENT, i, i + 0.5)

    threads = [threading.Thread(target=compile_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.wait() is None


def test_a_step_is_open_until_its_outermost_one_ends():
    clock = CompileClock()
    clock.began(EVENT)
    clock.began(EVENT)
    clock.ended(EVENT, 1.0, 2.0)
    assert clock.wait() == "a program is being compiled"
    clock.ended(EVENT, 0.0, 3.0)
    assert clock.wait() is None
    assert clock.seconds() == 3.0


def test_a_step_that_an_interrupt_left_open_ends_with_its_program():
    clock = CompileClock()
    with clock.waiting("tokens"):
        clock.began(EVENT)
    assert clock.wait() is None


def test_background_work_inside_background_work_ends_none_of_it():
    clock = CompileClock()
    with in_background():
        with in_background():
            clock.began(EVENT)
        clock.began(EVENT)
        assert clock.wait() is None
    clock.began(EVENT)
    assert clock.wait() is not None

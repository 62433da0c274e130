"""Settings of the whole process that several threads lower at once."""

import sys
import threading

import pytest

from qwen3_moe_jax.machine import threads

SHORT, SHORTER = 1e-3, 1e-4


def side_by_side(first, second):
    """Enters ``first``, then ``second`` in another thread, leaves ``first``, then ``second``."""
    entered, leave = threading.Event(), threading.Event()

    def other():
        with second:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        entered.wait()
        yield
    yield
    leave.set()
    thread.join()
    yield


@pytest.mark.parametrize(("first", "second"), [(SHORT, SHORTER), (SHORTER, SHORT), (SHORT, SHORT)])
def test_the_turns_of_threads_are_as_short_as_any_asks_and_then_as_before(first, second):
    before = sys.getswitchinterval()
    steps = side_by_side(threads.shares_the_lock(first), threads.shares_the_lock(second))
    found = [sys.getswitchinterval() for _ in steps]
    assert found == pytest.approx([min(first, second), second, before])


def test_products_get_their_threads_back_when_the_last_of_two_checks_ends(monkeypatch):
    """Two models that are loaded at once: each is checked with one thread per product."""

    class Library:
        count = 8

    setattr(Library, threads._GETTER, lambda self: self.count)
    setattr(Library, threads._SETTER, lambda self, count: setattr(self, "count", count))
    library = Library()
    monkeypatch.setattr(threads, "_openblas", lambda: library)
    steps = side_by_side(threads.one_thread_per_product(), threads.one_thread_per_product())
    assert [library.count for _ in steps] == [1, 1, 8]

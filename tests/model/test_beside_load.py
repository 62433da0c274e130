"""Weights and what a session is made of, one after the other or side by side; faults of either."""

import threading

import pytest

from qwen3_moe_jax.jax_backend.beside_load import load_beside


class Parts:
    """Two parts that each say what they did; ``fails`` names one that does not."""

    def __init__(self, fails: str = ""):
        self.did, self.fails = [], fails
        self.up, self.ready = threading.Event(), threading.Event()

    def get_ready(self) -> str:
        self.did.append("ready")
        self.ready.set()
        if self.fails == "ready":
            raise ValueError("ready")
        return "programs"

    def load(self, progress) -> str:
        progress(0, 2)
        self.did.append("loading")
        progress(1, 2)
        if self.fails == "load":
            raise KeyError("load")
        progress(2, 2)
        self.did.append("loaded")
        return "weights"

    def run(self, is_beside: bool, load=None) -> str:
        told = []
        begin = lambda found: self.did.append(f"began {found}")
        undo = lambda: self.did.append("undone")
        options = {"undo": undo, "is_beside": is_beside}
        return load_beside(self.get_ready, begin, load or self.load, lambda *at: told.append(at), **options)


@pytest.mark.parametrize("is_beside", [False, True])
def test_both_are_done_and_programs_are_begun_once(is_beside):
    parts = Parts()
    assert parts.run(is_beside) == "weights"
    assert sorted(parts.did) == ["began programs", "loaded", "loading", "ready"]
    assert parts.did.index("loading") < parts.did.index("began programs"), "the first weights go first"


def test_the_load_does_not_wait_for_what_is_got_ready():
    """It ends before the other begins."""
    parts = Parts()

    def load(progress):
        found = Parts.load(parts, progress)
        parts.up.set()
        return found

    kept = parts.get_ready
    parts.get_ready = lambda: parts.up.wait(60) and kept()
    assert parts.run(True, load) == "weights"
    assert parts.did == ["loading", "loaded", "ready", "began programs"]


@pytest.mark.parametrize("is_beside", [False, True])
def test_a_load_that_fails_undoes_what_was_got_ready(is_beside):
    parts = Parts("load")
    with pytest.raises(KeyError):
        parts.run(is_beside)
    assert parts.did[-1] == "undone"


@pytest.mark.parametrize("is_beside", [False, True])
def test_what_cannot_be_got_ready_is_raised(is_beside):
    parts = Parts("ready")
    with pytest.raises(ValueError, match="ready"):
        parts.run(is_beside)
    assert "undone" not in parts.did

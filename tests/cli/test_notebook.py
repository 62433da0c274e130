"""Progress in notebooks: a bar in its cell, nothing elsewhere, and nothing left at the end."""

from contextlib import nullcontext

import pytest

import qwen3_moe_jax as q3
from qwen3_moe_jax.core import notebook, terminal


class Handle:
    """What ``IPython.display.display`` gives, with all that was shown."""

    def __init__(self):
        self.shown = []

    def update(self, bar):
        self.shown.append((repr(bar), bar._repr_html_()))


@pytest.fixture
def cell(monkeypatch):
    """A notebook's cell, and a clock that the test sets."""
    handle = Handle()
    now = [0.0]
    ipython = pytest.importorskip("IPython.display")
    monkeypatch.setattr(ipython, "display", lambda bar, display_id: handle.update(bar) or handle)
    monkeypatch.setattr(notebook, "in_notebook", lambda: True)
    monkeypatch.setattr(notebook.time, "monotonic", lambda: now[0])
    return handle.shown, now


def test_a_long_job_has_a_bar_that_is_taken_away(cell):
    shown, now = cell
    with notebook.progress(None, "loading <x>") as report:
        for second in range(6):
            now[0] = second
            report(second * 10**8, 10**9)
            report(second * 10**8, 10**9)  # too soon for another update
    texts = [text for text, _ in shown]
    assert texts[0] == "loading <x>: 100.0 MB of 1.00 GB, 100.0 MB/s, 9 s left"
    assert len(texts) == 6
    assert texts[-1] == ""
    assert '<progress value="500000000" max="1000000000"></progress> loading &lt;x&gt;' in shown[-2][1]


def test_a_short_job_shows_nothing(cell):
    with notebook.progress(None, "loading") as report:
        report(1, 2)
    assert not cell[0]


def test_who_asks_for_none_or_brings_a_callback_gets_that(cell):
    seen = []
    with notebook.progress(False, "loading") as report:
        assert report is None
    with notebook.progress(lambda *counts: seen.append(counts), "loading") as report:
        report(1, 2)
    assert seen == [(1, 2)]


def test_outside_of_notebooks_a_bar_is_shown_if_asked_for(monkeypatch):
    assert not notebook.in_notebook()
    with notebook.progress(None, "loading") as report:
        assert report is None
    labels = []
    monkeypatch.setattr(terminal, "show_progress", lambda label: nullcontext(labels.append(label)))
    q3.load(backend="reference", gate=False, progress=True).close()
    assert labels == ["loading"]

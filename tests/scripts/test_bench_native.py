"""bench_native: ratios are of the best rounds, and a peer that fails is named."""

import sys

import pytest

from scripts import bench_native


def figures(rate: float, load: float) -> dict[str, float]:
    return {row: rate for row in bench_native.rows(512)} | {"load_s": load}


def test_ratios_are_of_the_best_rounds(monkeypatch, tmp_path):
    rounds = iter([figures(100, 2), figures(90, 1), figures(300, 3), figures(60, 5)])
    monkeypatch.setattr(bench_native, "measure", lambda python, *_: dict(next(rounds)))
    monkeypatch.setattr(bench_native, "shown_rate", lambda path, tokens: 290.0)
    (tmp_path / "model").write_bytes(b"123")
    lines = []
    found = bench_native.compared(str(tmp_path / "model"), "a python", 2, lines.append)
    assert set(found["ratios"].values()) == {300 / 90}
    assert found["generate_of_bench"] == 290 / 300
    assert (found["load_ratio"], found["bytes"], len(lines)) == (2.0, 3, 2)
    assert [len(found[side]) for side in ("here", "llama_cpp")] == [2, 2]


def test_a_text_that_ends_early_gives_no_rate(monkeypatch):
    """A model of random weights ends some, and one token alone has no rate."""
    asked, second = [], bench_native.TEXTS[1]

    def generated(path, text, tokens):
        asked.append(text)
        is_long = text == second
        return {"new_tokens": tokens if is_long else 1, "tokens_per_s": 290.0 if is_long else None}

    monkeypatch.setattr(bench_native, "generated", generated)
    assert bench_native.shown_rate("a file", 64) == 290.0
    assert tuple(asked) == bench_native.TEXTS[:2]
    monkeypatch.setattr(bench_native, "TEXTS", ("def",))
    with pytest.raises(RuntimeError, match="no rate"):
        bench_native.shown_rate("a file", 64)


def test_a_program_that_fails_is_named_with_its_reason(tmp_path):
    with pytest.raises(RuntimeError, match="No module named 'cyllama'"):
        bench_native.measure(sys.executable, "import cyllama", "a file", 2, 64)


def test_the_peers_program_needs_nothing_of_this_project():
    compile(bench_native.PEER, "peer", "exec")
    compile(bench_native.HERE, "here", "exec")
    assert "qwen3_moe" not in bench_native.PEER

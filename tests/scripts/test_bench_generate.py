"""A model whose first token ends the text: the time to that token is still a figure."""

import sys
from types import SimpleNamespace

import pytest

from scripts.bench_generate import FIRST_TEXT

END = 7


class AtOnceAtItsEnd:
    """A runner whose every token is an end: with stop tokens it would write nothing."""

    def stream(self, ids, *, max_tokens, sampling, stop_ids=()):
        return iter([END] * max_tokens if END not in stop_ids else [])


def test_tokens_are_written_though_the_first_one_ends_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    tokenizer = SimpleNamespace(encode=lambda text: [1, 2], stop_ids=(END,))
    model = SimpleNamespace(tokenizer=tokenizer, runner=AtOnceAtItsEnd())
    monkeypatch.setattr("qwen3_moe_jax.api.load", lambda path, backend, first_prompt: model)
    monkeypatch.setattr(sys, "argv", ["-c", "", "reference", "[1, 2]", "9"])
    exec(FIRST_TEXT, {})
    first, rate = capsys.readouterr().out.split()
    assert first == "first"
    assert float(rate) > 0

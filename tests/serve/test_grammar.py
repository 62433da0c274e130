"""Grammars in processes of their own: one that takes too long is ended, and no other notices."""

import asyncio
import os
import signal

import pytest

from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.serve.grammar import Grammars, SchemaError, TooManyGrammarsError
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.serve.text_model import TextModel

pytest.importorskip("llguidance")

SLOW = {"enum": [f"text number {i}" for i in range(9000)]}
"""Takes 36 ms of CPU time where an integer takes 1."""


@pytest.fixture(scope="module")
def model():
    return TextModel(embedded_model())


def play(model, work, **settings):
    """Runs ``work(grammars)`` with a process of its own."""

    async def main():
        grammars = Grammars(model, Settings(**settings), str(embedded_model()))
        try:
            return await work(grammars)
        finally:
            grammars.close()

    return asyncio.run(main())


def test_a_slow_schema_is_ended_and_others_go_on(model):
    digit = model.tokenizer.encode("7")

    async def work(grammars):
        other = await grammars.json_schema({"type": "integer"})
        with pytest.raises(SchemaError, match="takes too long"):
            await grammars.json_schema(SLOW)
        await other.take(digit)
        assert other.is_over
        again = await grammars.json_schema({"type": "boolean"})
        assert not again.is_over
        return again.mask() != other.mask()

    assert play(model, work, schema_seconds=0.01)


def test_the_same_schema_fits_when_it_has_time(model):
    async def work(grammars):
        return (await grammars.json_schema(SLOW)).is_over

    assert play(model, work, schema_seconds=60.0) is False


def test_copies_are_at_places_of_their_own(model):
    one, two = (model.tokenizer.encode(text) for text in ("1", "-"))

    async def work(grammars):
        first = await grammars.json_schema({"type": "integer"})
        second = first.copy()
        await first.take(one)
        await second.take(two)
        assert first.is_over
        assert not second.is_over
        assert grammars.active == 1

    play(model, work)


def test_grammars_are_counted_and_given_back(model):
    async def work(grammars):
        held = [await grammars.json_object() for _ in range(3)]
        with pytest.raises(TooManyGrammarsError):
            await grammars.json_object()
        held.clear()
        await grammars.json_object()

    play(model, work, max_grammars=3)


def test_a_process_that_is_killed_is_started_again(model):
    async def work(grammars):
        await grammars.json_object()
        os.kill(grammars._process.pid, signal.SIGKILL)
        grammars._process.wait()
        return (await grammars.json_object()).is_over

    assert play(model, work) is False

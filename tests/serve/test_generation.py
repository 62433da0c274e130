"""An answer's tokens in parts of any size are the same answer; a reader of the whole is woken once."""

import asyncio
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("msgspec")

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.serve import generation
from qwen3_moe_jax.serve.engine.client import EngineDiedError, Part, Stream
from qwen3_moe_jax.serve.engine.frames import Submit
from qwen3_moe_jax.serve.generation import Answer, Wish, joined
from qwen3_moe_jax.serve.tools import CallArguments
from qwen3_moe_jax.text.stream import StopStrings
from qwen3_moe_jax.text.tokenizer import _Remembered

TOOLS = {"add": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TEXTS = {
    "plain": "Some words, é and 𝄞.",
    "thinking": "<think>\nSo < it </thi goes\n</think>\n\nYes: </think> no.",
    "a call": f"Well: {CALL} and{CALL}",
    "thinking and a call": f"\n<think>hm</think>{CALL}",
}


class Engine:
    """Gives streams whose parts the test puts."""

    ready, reruns = None, 0

    def __init__(self):
        self.streams: list[Stream] = []

    def submit(self, prompt, **fields) -> Stream:
        fields = {name: value for name, value in fields.items() if name in Submit.__struct_fields__}
        self.streams.append(Stream(Submit(len(self.streams), token_ids=prompt, **fields)))
        return self.streams[-1]

    def cancel(self, stream):
        """Nothing runs."""


class Letters:
    """A tokenizer whose ids are bytes."""

    shown_bytes = _Remembered(lambda token_id: bytes([token_id]))


def answer_to(**wish) -> tuple[Answer, Engine]:
    engine, model = Engine(), SimpleNamespace(tokenizer=Letters(), context=4096)
    return Answer(engine, model, Wish([1, 2], Sampling(), **wish)), engine


def whole(deltas) -> list:
    """With the pieces of one call's arguments in one."""
    found = []
    for delta in deltas:
        if isinstance(delta, CallArguments) and found and isinstance(found[-1], CallArguments):
            found[-1] = CallArguments(delta.index, found[-1].text + delta.text)
        else:
            found.append(delta)
    return found


def outcome(text: str, cuts: list[int], **wish):
    """All that is known of an answer whose tokens came in parts that end at ``cuts``."""
    answer, _ = answer_to(**wish)
    tokens = list(text.encode())
    deltas = []
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        if not answer.finish_reason:
            deltas += answer._push(Part(tokens[start:end]))
    if not answer.finish_reason:
        deltas += answer._finish("stop")
    return whole(joined(deltas)), answer.token_ids, answer.usage, answer.finish_reason, answer.stop_string


@pytest.mark.parametrize("stop", [(), ("goes", "and"), ("é and", "no", "tool_call")])
@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_parts_of_any_size_are_one_answer(name, one_call, stop):
    text, rng = TEXTS[name], random.Random(3)
    count = len(text.encode())
    wish = {"schemas": TOOLS if "call" in name else None, "one_call": one_call, "stop": stop}
    expected = outcome(text, list(range(1, count)), **wish)
    assert expected[1], "something was written"
    cuts = [[], *([n] for n in range(1, count)), *(sorted(rng.sample(range(1, count), 4)) for _ in range(20))]
    for chosen in cuts:
        assert outcome(text, chosen, **wish) == expected, chosen


def test_tokens_that_come_together_are_looked_at_together(monkeypatch):
    """Not once for each token: that is most of what the front does in the time of a small model's token."""
    looks, push = [], StopStrings.push
    monkeypatch.setattr(StopStrings, "push", lambda self, text: looks.append(text) or push(self, text))
    answer, _ = answer_to(splits=False, stop=("never",))
    for _ in range(10):
        assert list(answer._push(Part(list(b"sixteen letters.")))) == [generation.Text("sixteen letters.")]
    assert len(looks) == 10


@pytest.mark.parametrize(("stop", "wakes"), [((), 1), (("never",), 50)])
def test_a_reader_of_the_whole_is_woken_at_the_end(stop, wakes):
    """Where a stop string may end it, at each part."""
    pushed = []

    async def main():
        answer, engine = answer_to(splits=False, stop=stop, max_tokens=100)
        push = answer._push
        answer._push = lambda part: pushed.append(part) or push(part)
        answer.submit()
        task = asyncio.ensure_future(answer.whole())
        for number in range(50):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            engine.streams[0].put(Part(list(b"ab"), "length" if number == 49 else None))
        return await task, answer

    deltas, answer = asyncio.run(main())
    assert "".join(map(generation.text_of, deltas)) == "ab" * 50
    assert (answer.finish_reason, answer.usage.completion) == ("length", 100)
    assert len(pushed) == wakes


def test_a_reader_of_the_whole_hears_of_an_engine_that_died():
    async def main():
        answer, engine = answer_to(splits=False)
        answer.submit()
        task = asyncio.ensure_future(answer.whole())
        await asyncio.sleep(0)
        engine.streams[0].put(Part(list(b"ab")))
        engine.streams[0].put(EngineDiedError())
        await asyncio.wait_for(task, 60)

    with pytest.raises(EngineDiedError):
        asyncio.run(main())

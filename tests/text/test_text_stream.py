"""Stop strings, reasoning and counts, whatever the borders of tokens."""

import random
from collections.abc import Generator

import pytest

from qwen3_moe_jax.text.stream import Piece, ReasoningSplitter, StopStrings, TextStream


def cuts(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(len(text) + 2)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def stopped(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    strings = StopStrings(stops)
    shown = "".join(map(strings.push, pieces))
    return shown + ("" if strings.found else strings.finish()), strings.found


def stopped_by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete, the longest where two are."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("seed", range(300))
def test_stop_strings_equal_their_definition(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices("ab", k=rng.randrange(12)))
    stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randrange(4))]
    assert stopped(cuts(text, rng), stops) == stopped_by_definition(text, stops), f"{seed=} {text=} {stops=}"


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    strings = StopStrings(["\nUser:", "END"])
    assert [strings.push(piece) for piece in ("ab", "\n", "Us", "er", "s", " E", "N", "X")] == [
        "ab", "", "", "", "\nUsers", " ", "", "ENX",
    ]  # fmt: skip


def test_nothing_is_shown_after_a_stop_string():
    strings = StopStrings("x")
    assert [strings.push("axb"), strings.push("c"), strings.finish()] == ["a", "", ""]


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [5], [None]])
def test_stop_strings_are_checked(stop):
    with pytest.raises(ValueError, match="stop string"):
        StopStrings(stop)


REASONING = [
    ("<think>\nHm, 2.\n\n</think>\n\nFour.\n", False, "Hm, 2.", "Four.\n"),
    ("\n<think>a</think>b", False, "a", "b"),
    ("<think>\n\n</think>\n\nb", False, "", "b"),
    ("Just text", False, "", "Just text"),
    ("\n <thinker>", False, "", "\n <thinker>"),
    ("a <think>b</think>", False, "", "a <think>b</think>"),
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ("<think>\na < b </thin\n\nc", False, "a < b </thin\n\nc", ""),
    ("<think>\ncut </thi", False, "cut </thi", ""),
    ("<thi", False, "", "<thi"),
    ("", False, "", ""),
    ("Hm\n</think>\n\nFour", True, "Hm", "Four"),
    ("\nHm</think>Four", True, "Hm", "Four"),
    ("<think>\nHm</think>Four", True, "Hm", "Four"),
    ("cut", True, "cut", ""),
]


@pytest.mark.parametrize(("text", "is_open", "reasoning", "content"), REASONING)
def test_reasoning_is_split_the_same_at_any_cut(text, is_open, reasoning, content):
    for seed in range(60):
        splitter = ReasoningSplitter(starts_in_reasoning=is_open)
        parts = cuts(text, random.Random(seed))
        pieces = [piece for part in parts for piece in splitter.push(part)] + splitter.finish()
        joined = {
            kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content")
        }
        assert joined == {"reasoning": reasoning, "content": content}, f"{seed=} {parts=}"
        assert all(piece.text for piece in pieces)


def test_reasoning_comes_as_soon_as_it_can():
    splitter = ReasoningSplitter()
    assert splitter.push("<think>\nab") == [Piece("reasoning", "ab")]
    assert splitter.push("\n") == []
    assert splitter.push("c<") == [Piece("reasoning", "\nc")]
    assert splitter.push("/think>\n") == []
    assert splitter.push("\nd") == [Piece("content", "d")]


class Tokens(Generator):
    """A runner's generator that knows whether it was closed."""

    def __init__(self, ids):
        self.ids = iter(ids)
        self.closed = False

    def send(self, value):
        return next(self.ids)

    def throw(self, *error):
        raise NotImplementedError

    def close(self):
        self.closed = True


def test_text_and_counts(qwen3_tokenizer):
    text = "Hello 🦙, naïve 我想"
    ids = qwen3_tokenizer.encode(text)
    stream = TextStream(qwen3_tokenizer, ids, max_tokens=100, prompt_tokens=7)
    assert stream.finish_reason is None
    pieces = list(stream)
    assert "".join(pieces) == text
    assert all(pieces)
    assert (stream.finish_reason, stream.prompt_tokens, stream.new_tokens) == ("stop", 7, len(ids))
    assert stream.stop_string is None


def test_length(qwen3_tokenizer):
    ids = qwen3_tokenizer.encode("is 🦙")[:-1]
    stream = TextStream(qwen3_tokenizer, ids, max_tokens=len(ids), stop=["\ufffd\ufffd"])
    assert "".join(stream) == "is \ufffd"
    assert stream.finish_reason == "length"


def test_a_stop_string_across_tokens_ends_the_runner(qwen3_tokenizer):
    ids = qwen3_tokenizer.encode("one two three four five six")
    tokens = Tokens(ids)
    stream = TextStream(qwen3_tokenizer, tokens, stop=["wo thr"], max_tokens=len(ids))
    assert "".join(stream) == "one t"
    assert (stream.finish_reason, stream.stop_string, stream.new_tokens) == ("stop", "wo thr", 3)
    assert tokens.closed


def test_what_was_held_for_a_stop_string_comes_at_the_end(qwen3_tokenizer):
    stream = TextStream(qwen3_tokenizer, qwen3_tokenizer.encode("one two"), stop=[" two three"])
    assert "".join(stream) == "one two"


def test_leaving_early_closes_the_runner(qwen3_tokenizer):
    tokens = Tokens(qwen3_tokenizer.encode("one two three"))
    texts = iter(TextStream(qwen3_tokenizer, tokens))
    next(texts)
    texts.close()
    assert tokens.closed


def test_an_error_of_the_runner_passes_through(qwen3_tokenizer):
    def broken():
        yield 6023
        raise ArithmeticError("NaN")

    stream = TextStream(qwen3_tokenizer, broken())
    with pytest.raises(ArithmeticError):
        list(stream)
    assert stream.finish_reason is None


def test_pieces(qwen3_tokenizer):
    ids = qwen3_tokenizer.encode("<think>\nTwo.\n</think>\n\nFour. END")
    stream = TextStream(qwen3_tokenizer, ids, stop=[" END"])
    pieces = list(stream.pieces())
    assert "".join(p.text for p in pieces if p.kind == "reasoning") == "Two."
    assert "".join(p.text for p in pieces if p.kind == "content") == "Four."
    assert stream.finish_reason == "stop"
    cut = TextStream(qwen3_tokenizer, qwen3_tokenizer.encode("<think>a\n"))
    assert list(cut.pieces()) == [Piece("reasoning", "a"), Piece("reasoning", "\n")]
    open_already = TextStream(qwen3_tokenizer, qwen3_tokenizer.encode("a</think>b"), starts_in_reasoning=True)
    assert list(open_already.pieces()) == [Piece("reasoning", "a"), Piece("content", "b")]


def test_notes_of_a_rendered_chat_reach_the_caller(source, reference_runner):
    from qwen3_moe_jax.api import Model

    model = Model(source, reference_runner)
    user = {"role": "user", "content": "hi"}
    call = {"function": {"name": "f", "arguments": "no JSON"}}
    messages = [user, {"role": "assistant", "tool_calls": [call]}, user]
    (note,) = model.open_stream(messages, max_tokens=1).notes
    assert "are not JSON" in note
    assert model.answer(messages, max_tokens=1).notes == (note,)
    assert [a.notes for a in model.generate_batch([messages], max_tokens=1)] == [(note,)]
    assert model.answer([user], max_tokens=1).notes == ()

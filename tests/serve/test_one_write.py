"""Writes of one turn of the loop go out as one, in order, and none is lost or late."""

import asyncio
from asyncio.selector_events import _SelectorSocketTransport

import pytest

httpx = pytest.importorskip("httpx")

from qwen3_moe_jax.serve.one_write import LARGE, OneWrite  # noqa: E402
from qwen3_moe_jax.serve.settings import Settings  # noqa: E402
from qwen3_moe_jax.testing.fake_engine import FakeEngine  # noqa: E402
from qwen3_moe_jax.testing.http_server import quick_start, running  # noqa: E402


class Noting:
    """A transport that keeps what it is given."""

    def __init__(self):
        self.writes, self.is_closed = [], False

    def write(self, data):
        assert not self.is_closed
        self.writes.append(bytes(data))

    def close(self):
        self.is_closed = True

    def is_closing(self):
        return self.is_closed

    def get_write_buffer_size(self):
        return 0


def written(*steps):
    """What a transport was given by these steps, each in a turn of its own."""

    async def main():
        noting = Noting()
        joined = OneWrite(noting, asyncio.get_running_loop())
        for step in steps:
            step(joined)
            await asyncio.sleep(0)
        return noting

    return asyncio.run(main())


def test_what_is_written_in_a_turn_is_one_write():
    def three(to):
        for part in (b"a", bytearray(b"b"), memoryview(b"c")):
            to.write(part)
        assert to.get_write_buffer_size() == 3

    assert written(three, lambda to: None, lambda to: to.write(b"d")).writes == [b"abc", b"d"]


def test_bytes_that_change_afterwards_are_those_of_the_call():
    def changes(to):
        given = bytearray(b"a")
        to.write(given)
        given[:] = b"b"

    assert written(changes).writes == [b"a"]


def test_much_does_not_wait_for_the_turns_end():
    """So that a slow reader is noticed before all of a long answer is in memory."""
    sizes = []

    def many(to):
        for _ in range(40):
            to.write(bytes(LARGE // 8))
            sizes.append(to.get_write_buffer_size())

    found = written(many)
    assert max(sizes) <= LARGE
    assert sum(len(data) for data in found.writes) == 5 * LARGE


def test_what_was_written_before_a_close_goes_out_and_nothing_after_it():
    def closes(to):
        to.write(b"a")
        to.close()
        to.write(b"b")

    found = written(closes)
    assert (found.writes, found.is_closed) == ([b"a"], True)


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_an_answer_ends_with_is_one_write(model_files, monkeypatch, is_stream):
    """The reason, the counts and the end of a stream; head and body of a reply that does not stream."""
    writes, write = [], _SelectorSocketTransport.write

    def noted(transport, data):
        writes.append(bytes(data))
        write(transport, data)

    monkeypatch.setattr(_SelectorSocketTransport, "write", noted)
    start = quick_start(model_files["hermes"])
    body = {"prompt": "x", "max_tokens": 3, "stream": is_stream, "stream_options": {"include_usage": True}}
    with running(Settings(port=0), start, engine=FakeEngine(start)) as server:
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200
    (last,) = [data for data in writes if b'"completion_tokens":3' in data]
    assert b'"finish_reason":"length"' in last
    if is_stream:
        assert last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    else:
        assert last.startswith(b"HTTP/1.1 200 OK\r\n")

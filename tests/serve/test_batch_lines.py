"""A batch's lines, their order, the file of results and the estimate: without a model."""

import json
import random

import pytest

from qwen3_moe_jax.core.errors import OptionError, OutputFileError
from qwen3_moe_jax.serve.batch import lines, order, results
from qwen3_moe_jax.serve.batch.estimate import Estimate, duration
from tests.tolerances import BATCH_ESTIMATE


def request(name, prompt="x", *, limit=5, **fields) -> dict:
    body = {"prompt": prompt, "max_tokens": limit}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body, **fields}


def parsed(*values) -> list[lines.Line]:
    data = [v if isinstance(v, bytes) else json.dumps(v).encode() for v in values]
    return list(lines.read(line + b"\n" for line in data))


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (b"{", "invalid_json", "line is no valid JSON"),
        (b"[1]", "invalid_json", "the line must be a JSON object"),
        (b'{"custom_id": "a", "custom_id": "b"}', "invalid_json", "a key twice"),
        (b"\xff", "invalid_json", "UTF-8"),
        (request(7), "invalid_custom_id", "text of 1 to"),
        (request(""), "invalid_custom_id", "text of 1 to"),
        (request("a", method="GET"), "invalid_method", "POST"),
        (request("a", url="/v1/embeddings"), "invalid_url", "/v1/chat/completions"),
        (request("a", body=[1]), "invalid_body", "JSON object"),
        (request("a", body={"prompt": "x", "stream": True}), "invalid_body", "cannot stream"),
    ],
)
def test_a_line_that_is_no_request_says_why(value, code, words):
    (line,) = parsed(value)
    assert line.code == code
    assert words in line.fault
    assert line.name == (line.custom_id or 1)


def test_blank_lines_and_a_byte_order_mark_are_no_lines():
    found = parsed(b"\xef\xbb\xbf" + json.dumps(request("a")).encode(), b"  ", request("b"))
    assert [(line.number, line.custom_id, line.code) for line in found] == [(1, "a", ""), (3, "b", "")]


def test_a_custom_id_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(request(name)) for name in ("a", "b", "a")))
    with pytest.raises(OptionError, match="lines 1 and 3 have one custom_id, 'a'"):
        lines.check(str(path))
    path.write_text("\n\n")
    with pytest.raises(OptionError, match="has no requests"):
        lines.check(str(path))


def test_what_begins_alike_stands_together_and_long_work_comes_first():
    shared = "You are a careful assistant. " * 20
    values = [request("short"), request("p1", shared + "b"), request("long", limit=9000)]
    values += [request("p2", shared + "a"), request("middle", limit=500)]
    found = [line.custom_id for line in order.ordered(parsed(*values))]
    assert found == ["long", "middle", "p2", "p1", "short"]


def answer(name) -> dict:
    return results.result(name, response={"status_code": 200, "request_id": "r", "body": {}})


def test_a_partial_last_line_is_cut_off_and_written_again(tmp_path):
    path = tmp_path / "o.jsonl"
    with results.open_results(path) as found:
        found.write([answer("a"), answer("b")])
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with results.open_results(path) as found:
            assert found.names == {"ab"[i] for i in range(whole[:size].count(b"\n"))}
            found.write([answer(name) for name in "ab" if name not in found.names])
        assert path.read_bytes() == whole


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    request = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}})
    own = json.dumps(answer("a"))
    for text in ("my notes\n", '{"a": 1}\n', f"{own}\nx\n", f"{request}\n", "my notes", f"{own}\n{request}"):
        path.write_text(text)
        with pytest.raises(OutputFileError, match="is no result of a batch"), results.open_results(path):
            pass
        assert path.read_text() == text


def test_one_program_at_a_time_writes_results(tmp_path):
    path = tmp_path / "o.jsonl"
    with (
        results.open_results(path),
        pytest.raises(results.ResultsBusyError, match="another process"),
        results.open_results(path),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["o.jsonl"]


class FullDisk:
    """A file whose disk takes ``room`` bytes more."""

    def __init__(self, file, room):
        self._file, self._room = file, room
        self.truncate = file.truncate

    def write(self, data):
        part = data[: self._room]
        self._file.write(part)
        if len(part) < len(data):
            raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "o.jsonl"
    with results.open_results(path) as found:
        found.write([answer("a")])
        found._file = FullDisk(found._file, 10)
        with pytest.raises(OutputFileError, match="No space left"):
            found.write([answer("b")])
    with results.open_results(path) as found:
        assert found.names == {"a"}


def test_lines_that_are_no_answers_can_be_asked_again(tmp_path):
    path = tmp_path / "o.jsonl"
    with results.open_results(path) as found:
        failed = results.result("b", response={"status_code": 500, "request_id": "r", "body": {}})
        found.write([answer("a"), failed, results.result(None, error={"code": "invalid_json", "line": 3})])
        assert found.errors == 2
    assert results.without_failures(path) == 2
    with results.open_results(path) as found:
        assert found.names == {"a"}


def test_the_estimate_is_that_of_a_batch_with_known_rates():
    """A virtual batch: 16 slots that write a token per tick each, limits used to a half on average."""
    rng, now = random.Random(0), [0.0]
    prompt = lambda i: f"{i} " + "x" * rng.randrange(4000)
    todo = parsed(*(request(str(i), prompt(i), limit=rng.randrange(50, 800)) for i in range(400)))
    estimate, told = Estimate(todo, clock=lambda: now[0]), []
    waiting, running = order.ordered(todo), {}
    now[0] = 300.0  # loading
    estimate.start()
    now[0] += 200.0  # compilation, before the first token
    while waiting or running:
        while waiting and len(running) < 16:
            line = waiting.pop(0)
            running[line] = [0, max(1, round(line.limit * rng.random()))]
            estimate.begin(line)
        now[0] += 1.0
        for line, count in list(running.items()):
            count[0] += 1
            if count[0] == count[1]:
                del running[line]
                estimate.end(line, count[1])
        told.append((now[0], estimate.done, estimate.seconds_left()))
    end = now[0]
    assert told[0][2] is None
    for share in (0.2, 0.4, 0.6, 0.8):
        when, _, left = next(t for t in told if t[1] >= share * 400)
        slack = max(BATCH_ESTIMATE * (end - when), 800 / 2)  # slots are idle while the longest answers end
        assert abs(left - (end - when)) < slack, share


def test_a_rate_is_without_the_time_for_programs():
    now = [0.0]
    (line,) = parsed(request("a", "x", limit=90))
    estimate = Estimate([line], clock=lambda: now[0])
    estimate.start()
    estimate.begin(line)
    now[0], estimate.program_seconds = 12.0, 3.0
    estimate.end(line, 90)
    assert estimate.rate == 10
    assert estimate.figures() == "; 90 new tokens in 12 s (programs: 3 s), 10 tokens/s"


def test_times_are_told_in_two_units():
    assert [duration(s) for s in (0.4, 59, 61, 7300)] == ["0 s", "59 s", "1 min 1 s", "2 h 1 min"]

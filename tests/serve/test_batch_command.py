"""``qwen3-moe batch``: the server's own answers, each line once, whatever ends the program."""

import json
import os
import signal
import subprocess

import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.testing import terminal

# One sequence at a time in NumPy: nothing is compiled.
QUICK = ("--backend", "reference", "--no-gate", "--context", "256")


def chat(name, text, **body) -> str:
    messages = [{"role": "user", "content": text}]
    fields = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps({**fields, "body": {"messages": messages, "temperature": 0, **body}})


def completion(name, prompt, max_tokens=3) -> str:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def batch(model_files, tmp_path, capfd):
    """Writes lines, runs the command, gives its exit code, results by custom_id, and what it said."""
    path, out = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"

    def run(*lines: str, options=QUICK):
        path.write_text("\n".join(lines) + "\n")
        code = main(["batch", str(path), "-o", str(out), "-m", str(model_files["hermes"]), *options])
        found = written(out) if out.exists() else []
        return code, {r["custom_id"]: r for r in found}, capfd.readouterr().err

    return run


@pytest.fixture(scope="module")
def mixed() -> list[str]:
    return [
        chat("hello", "[[hello]]"),
        "nonsense",
        chat("hot", "[[hello]]", temperature=-4),
        completion("text", "x"),
        chat("long", "word " * 300),
        chat("two", "[[hello]]", n=2, max_tokens=2),
    ]


def test_good_and_bad_lines_get_their_results(batch, mixed):
    code, found, said = batch(*mixed)
    assert code == ExitCode.FAULT
    assert found.keys() == {"hello", None, "hot", "text", "long", "two"}
    body = found["hello"]["response"]["body"]
    assert body["choices"][0]["message"]["content"].startswith("Hello! I am a script")
    assert found["hello"]["error"] is None
    assert found["hello"]["response"]["request_id"].startswith("req_")
    assert found["text"]["response"]["body"]["choices"][0]["text"] == "yz"
    assert len(found["two"]["response"]["body"]["choices"]) == 2
    assert found["hot"]["response"]["status_code"] == 400
    assert "temperature" in found["hot"]["response"]["body"]["error"]["message"]
    assert found["long"]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert found[None]["error"]["line"] == 2
    assert "3 answers, 3 errors (2 x 400, 1 x invalid_json)" in said
    # again: nothing is left, and nothing is loaded or written
    assert batch(*mixed)[1] == found
    # answers to other requests
    code, _, said = batch(chat("other", "x"))
    assert (code, "has a result of" in said) == (ExitCode.USAGE, True)


@pytest.mark.parametrize("options", [(), ("--retry-errors",)])
def test_the_file_of_requests_is_never_taken_for_results(options, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text(chat("a", "x"))
    assert main(["batch", str(path), "-o", str(path), *options]) == ExitCode.USAGE
    assert "is the file of requests" in capsys.readouterr().err
    assert path.read_text() == chat("a", "x")


def test_a_whole_batch_with_one_name_twice_is_refused(batch):
    code, found, said = batch(chat("a", "x"), chat("a", "y"))
    assert (code, found) == (ExitCode.USAGE, {})
    assert "lines 1 and 2 have one custom_id" in said


def start(path, out, model, *options, **streams) -> subprocess.Popen:
    command = ["batch", str(path), "-o", str(out), "-m", str(model), *QUICK, *options]
    return terminal.start(*command, **streams)


STOPS_IN_A_LINE = (
    "import threading\n"
    "from qwen3_moe_jax.serve.batch import results\n"
    "write, writes = results._Whole.write, []\n"
    "def torn(file, data):\n"
    "    writes.append(data)\n"
    "    if len(writes) < 4:\n"
    "        return write(file, data)\n"
    "    write(file, data[: len(data) // 2])\n"
    "    threading.Event().wait()\n"
    "results._Whole.write = torn\n"
)
"""A command that stops for ever in its fourth write of results, in the middle of a line."""


def test_kill_9_in_a_line_leaves_each_line_once(model_files, tmp_path):
    """Killed while a line is being written, however busy the machine is; then run to its end."""
    path, out = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    names = [str(i) for i in range(60)]
    path.write_text("\n".join(completion(name, f"{name} x", 2) for name in names))
    process = start(path, out, model_files["hermes"], code=STOPS_IN_A_LINE + terminal.START)
    while not out.exists() or out.read_bytes().count(b"\n") < 3 or out.read_bytes().endswith(b"\n"):
        assert process.poll() is None, process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    *whole, torn = out.read_bytes().splitlines(keepends=True)
    before = b"".join(whole)
    assert 3 <= len(whole) < len(names)
    assert not torn.endswith(b"\n")
    process = start(path, out, model_files["hermes"])
    said = process.communicate(timeout=terminal.SECONDS)[1]
    assert process.returncode == 0, said
    kept = before.count(10)
    assert ("1 line has its result" if kept == 1 else f"{kept} lines have their result") in said
    assert out.read_bytes().startswith(before)
    assert sorted(r["custom_id"] for r in written(out)) == sorted(names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_keeps_what_is_answered(model_files, tmp_path, number):
    """The others come when the first is answered: one of them before it would never end."""
    out = tmp_path / "results.jsonl"
    process = start("-", out, model_files["hermes"], "--context", "4096")
    process.stdin.write(completion("0", "x", 3000) + "\n")
    process.stdin.flush()
    while not out.exists() or not out.read_bytes().count(b"\n"):
        assert process.poll() is None, process.stderr.read()
    process.stdin.write("".join(chat(str(i), "[[forever]]") + "\n" for i in range(1, 9)))
    process.stdin.flush()
    process.send_signal(number)
    said = process.communicate(timeout=terminal.SECONDS)[1]
    assert process.returncode == ExitCode.INTERRUPTED, said
    assert "the same command goes on with what is left" in said
    assert "Traceback" not in said
    assert "0" in [r["custom_id"] for r in written(out)]


def test_a_pipe_is_answered_as_it_comes(model_files, tmp_path):
    """The second request is sent after the first one's answer is on the disk."""
    out = tmp_path / "results.jsonl"
    process = start("-", out, model_files["hermes"], "-q")
    for count, line in enumerate((completion("a", "x"), completion("b", "x"), completion("b", "y")), 1):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        while not out.exists() or out.read_bytes().count(b"\n") < count:
            assert process.poll() is None, process.stderr.read()
    said = process.communicate(timeout=terminal.SECONDS)[1]
    assert (process.returncode, said) == (ExitCode.FAULT, "")
    *_, last = found = written(out)
    assert [r["custom_id"] for r in found] == ["a", "b", None]
    assert last["error"]["code"] == "duplicate_custom_id"
    assert "line 2 has the same custom_id" in last["error"]["message"]

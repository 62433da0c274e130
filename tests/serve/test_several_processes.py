"""One engine in several processes: serve and batch answer as in one, and end when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")

from tests.machine.test_processes import free_address  # noqa: E402

pytestmark = pytest.mark.timeout(400)

SECONDS = 300
QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "QWEN3_MOE_NATIVE": "off"}
ENGINE = ("--mesh", "ep=2", "--no-gate", "-c", 512, "--slots", 2)
PROMPTS = ("import os\n", "def f(x):\n", "class A:\n    def")


def started(stack: ExitStack, log: Path, *arguments: object) -> subprocess.Popen:
    """The command, whose notes and output go to a file."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "qwen3_moe_jax", *map(str, arguments)],
        stdout=stack.enter_context(log.open("w")),
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=os.environ | QUICKLY,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def group(address: str, index: int) -> tuple:
    return ("--coordinator", address, "--num-processes", 2, "--process-id", index)


def until(check, *processes: subprocess.Popen):
    """Waits for a value that is true."""
    end = time.monotonic() + SECONDS
    while not (found := check()):
        assert time.monotonic() < end
        assert all(p.poll() is None for p in processes)
        time.sleep(0.1)
    return found


def completion(url: str, prompt: str, tokens: int = 8) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS).json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """Texts of the reference."""
    import qwen3_moe_jax as q3

    with q3.load(backend="reference", gate=False, max_context=512) as model:
        return {p: model.generate(p, max_tokens=8, temperature=0, repetition_penalty=1.0) for p in PROMPTS}


class Serving:
    """serve in two processes."""

    def __init__(self, stack: ExitStack, folder: Path):
        address, port = free_address(), free_address().rsplit(":", 1)[1]
        self.url = f"http://127.0.0.1:{port}"
        self.logs = [folder / f"{index}.log" for index in range(2)]
        options = ("serve", *ENGINE, "--no-warm-up", "--no-page")
        self.first = started(stack, self.logs[0], *options, "--port", port, *group(address, 0))
        self.second = started(stack, self.logs[1], *options, *group(address, 1))
        until(lambda: "ready: " in self.logs[0].read_text(), self.first, self.second)


def test_serve_answers_as_the_reference_and_ends_in_all(tmp_path, expected):
    with ExitStack() as stack:
        serving = Serving(stack, tmp_path)
        for prompt in PROMPTS:
            assert completion(serving.url, prompt) == expected[prompt]
        scored = {"prompt": PROMPTS[0], "max_tokens": 1, "temperature": 0, "logprobs": 2}
        answer = httpx.post(f"{serving.url}/v1/completions", json=scored, timeout=SECONDS).json()
        assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == 1
        os.kill(serving.first.pid, signal.SIGTERM)
        assert serving.first.wait(SECONDS) == 0
        assert serving.second.wait(SECONDS) == 0
        assert serving.logs[1].read_text() == ""


@pytest.mark.parametrize("victim", ["second", "first"])
def test_serve_ends_when_one_dies(tmp_path, victim):
    with ExitStack() as stack:
        serving = Serving(stack, tmp_path)
        killed = getattr(serving, victim)
        left = serving.second if victim == "first" else serving.first
        os.kill(killed.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        code = left.wait(SECONDS)
        assert time.monotonic() - killed_at < 30
    if victim == "second":
        assert code == 1
        line = "qwen3-moe: process 1 of 2 has ended without a word: this process ends too"
        assert line in serving.logs[0].read_text().splitlines()
    else:  # its engine takes its leave when it sees that the front has gone
        assert code == 0


def test_batch_answers_as_the_reference(tmp_path, expected):
    requests, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = ({"prompt": p, "max_tokens": 8, "temperature": 0} for p in PROMPTS)
    lines = (
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}
        for n, body in enumerate(bodies)
    )
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with ExitStack() as stack:
        address, logs = free_address(), [tmp_path / f"{index}.log" for index in range(2)]
        both = [
            started(stack, log, "batch", requests, "-o", out, "-q", *ENGINE, *group(address, index))
            for index, (log, out) in enumerate(zip(logs, (results, tmp_path / "none.jsonl"), strict=True))
        ]
        codes = [process.wait(SECONDS) for process in both]
    assert codes == [0, 0], [log.read_text() for log in logs]
    answers = {a["custom_id"]: a for a in map(json.loads, results.read_text().splitlines())}
    texts = [answers[str(n)]["response"]["body"]["choices"][0]["text"] for n in range(len(PROMPTS))]
    assert texts == [expected[p] for p in PROMPTS]
    assert not (tmp_path / "none.jsonl").exists()
    assert logs[1].read_text() == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--replicas", 2), "--replicas are engines of one host"),
        (("--cache-ram", 1), "--cache-ram keeps whole rows"),
    ],
)
def test_what_several_processes_do_not_have_is_refused(tmp_path, options, words):
    for index in range(2):
        with ExitStack() as stack:
            log = tmp_path / "log"
            process = started(stack, log, "serve", *ENGINE, *options, *group(free_address(), index))
            assert process.wait(SECONDS) == 2
            assert words in log.read_text()
            assert len(log.read_text().splitlines()) == 1

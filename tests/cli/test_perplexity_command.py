"""``qwen3-moe perplexity`` as a person meets it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.commands import perplexity as command

TEXT = Path(__file__).parents[1] / "data" / "perplexity-text.txt"
QUICK = ("--backend", "reference", "--no-gate")


@pytest.fixture
def short(tmp_path) -> str:
    path = tmp_path / "short.txt"
    path.write_text(TEXT.read_text()[:1000])
    return str(path)


def test_the_second_halves_are_scored_unless_a_stride_is_given(short, capsys):
    assert main(["perplexity", short, "--context", "64", *QUICK]) == 0
    shown = capsys.readouterr()
    assert re.match(r"perplexity \d+\.\d{4} \+- \d+\.\d{4}\n\d\.\d{4} bits per byte\n", shown.out)
    assert "the second half of" in shown.out
    assert "as llama-perplexity does" in shown.out
    assert "reference on CPU" in shown.err

    assert main(["perplexity", short, "--context", "64", "--stride", "32", *QUICK]) == 0
    assert "windows of up to 64, 32 apart, each token once" in capsys.readouterr().out


def test_a_text_without_one_window_is_scored_as_a_whole(tmp_path, capsys):
    """Somebody tries the command on a paragraph: a figure and how it was found, in place of a refusal."""
    path = tmp_path / "text.txt"
    path.write_text("def f(x):\n    return x + 1\n")
    assert main(["perplexity", str(path), *QUICK]) == 0
    shown = capsys.readouterr()
    assert "a window 512: each token is scored once" in shown.err
    assert "1 window of up to 512, 512 apart, each token once" in shown.out
    assert main(["perplexity", str(path), "--stride", "512", "--json", "-q", *QUICK]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert main(["perplexity", str(path), "--json", "-q", *QUICK]) == 0
    found = capsys.readouterr()
    assert (json.loads(found.out)["perplexity"], found.err) == (expected["perplexity"], "")
    assert json.loads(found.out)["stride"] == 512


def test_json_is_the_only_output(short, capsys):
    assert main(["perplexity", short, "--context", "64", "--stride", "64", "--json", "-q", *QUICK]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err == ""
    assert found["complete"] is True
    assert found["tokens_scored"] == found["text_tokens"] - found["windows"]
    assert found["context"] == found["stride"] == 64
    assert found["perplexity"] > 1
    assert found["bits_per_byte"] > 0
    assert found["backend"]["compute_dtype"] == "float32"
    assert found["model"].endswith("tiny-coder-Q4_K_M.gguf")


def test_standard_input_gives_what_the_file_gives(short, capsys):
    options = ["--context", "64", "-q", *QUICK]
    assert main(["perplexity", short, *options]) == 0
    of_file = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_moe_jax.cli", "perplexity", "-", *options],
        input=Path(short).read_bytes(),
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == of_file


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (b"", (), "is empty: perplexity needs a text"),
        (b"plain \xff\xfe", (), "text.txt is not UTF-8 (byte 6)"),
        (b"a few words", ("--context", "512"), "has 11 bytes, too few for 512 tokens"),
        (b"a", (), "has 1 bytes, too few for 2 tokens"),
        (b"word " * 300, ("--context", "1400"), "at least 1400 are needed: take a longer text or a smaller"),
        (b"word " * 300, ("--context", "3"), "a context of 3 tokens: a window needs at least 4"),
        (b"word " * 300, ("--context", "99999", "--stride", "5"), "this model takes from 2 to 4096"),
        (b"word " * 300, ("--stride", "-1"), "--stride -1: it must be at least 1"),
        (
            b"word " * 300,
            ("--stride", "513"),
            "a stride of 513 tokens: it must be from",
        ),
    ],
)
def test_what_cannot_be_measured_ends_in_one_clear_line(tmp_path, capsys, content, options, expected):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    is_option = "it must be" in expected or "this model" in expected or "a window" in expected
    assert main(["perplexity", str(path), "-q", *QUICK, *options]) == (2 if is_option else 1)
    shown = capsys.readouterr()
    last = shown.err.strip().splitlines()[-1]
    assert last.startswith("qwen3-moe: ")
    assert expected in last
    assert shown.out == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("no.txt", "No such file or directory"), ("", "it is a folder; - reads standard input")],
)
def test_a_missing_file_and_a_folder_are_named(tmp_path, capsys, name, expected):
    path = tmp_path / name
    assert main(["perplexity", str(path), *QUICK]) == 1
    assert capsys.readouterr().err == f"qwen3-moe: {path} cannot be read: {expected}\n"


def test_long_waits_show_the_estimate_so_far(short, capsys, monkeypatch):
    monkeypatch.setattr(command, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(command, "LINE_SECONDS", {True: 0.0, False: 0.0})
    assert main(["perplexity", short, "--context", "64", *QUICK]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("window")]
    assert lines
    assert re.fullmatch(r"window 1 of \d+: perplexity \d+\.\d{4} so far, \d+ s left", lines[0])


def test_ctrl_c_prints_the_estimate_so_far():
    # a suite that runs in the background of a shell has SIGINT ignored, and children inherit that
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from qwen3_moe_jax.commands import perplexity; perplexity.SLOW_SECONDS = 0; "
        "from qwen3_moe_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program, "perplexity", str(TEXT), "--context", "64", "--stride", "1"]
        + ["--json", *QUICK],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not process.stderr.readline().startswith("window"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in errors
    found = json.loads(out)
    assert found["complete"] is False
    assert 0 < found["windows"] < found["windows_in_all"]


def test_an_interrupted_estimate_says_so(short, capsys, monkeypatch):
    whole = command.estimates

    def some(*args, **options):
        yield next(whole(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "estimates", some)
    assert main(["perplexity", short, "--context", "64", *QUICK]) == 130
    assert "(interrupted after 1 of " in capsys.readouterr().out
    monkeypatch.setattr(
        command, "estimates", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert main(["perplexity", short, "--context", "64", *QUICK]) == 130
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "interrupted before the first window was scored" in shown.err

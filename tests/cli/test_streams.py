"""Standard streams as they really are: of any encoding, closed, full, or with a reader that goes away."""

import io
import os
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import contextmanager
from pathlib import Path

import pytest

from qwen3_moe_jax.cli import COMMANDS, main
from qwen3_moe_jax.commands import common
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.testing.gguf_builder import model_builder

SECONDS = 600
PROGRAM = [sys.executable, "-m", "qwen3_moe_jax.cli"]
QUICK = ("--backend", "reference", "--no-gate", "-q")
GENERATE = ("generate", "def f(x):\n", "-n", "2", *QUICK)

HOSTILE = "a\x1b[2J\x07b\nqwen3-moe: forged\x9bc\u202ed\u2028e"
ESCAPED = r"a\x1b[2J\x07b\nqwen3-moe: forged\x9bc\u202ed\u2028e"


def shell(redirection: str, *args: str, **options) -> subprocess.CompletedProcess:
    """A command with its streams redirected by the shell, as ``>&-``."""
    command = " ".join(f"'{word}'" for word in [*PROGRAM, *args])
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} {redirection}"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        **options,
    )


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory) -> Path:
    """A model with names that command a terminal and forge lines."""
    path = tmp_path_factory.mktemp("hostile") / f"model{chr(27)}[31m.gguf"
    model = model_builder()
    model.metadata |= {"general.name": HOSTILE, "general.description": HOSTILE}
    path.write_bytes(model.build())
    return path


def controls(text: str) -> set[str]:
    return {c for c in text if c not in "\n" and not c.isprintable()}


# Any encoding


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_character_that_the_output_lacks_is_replaced(encoding, tmp_path, monkeypatch, capsys):
    text = tmp_path / "\u4f60.txt"
    text.write_text("x = 1\n")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline=""))
    terminal.show_text("caf\u00e9 \u4f60 \U0001f600\n")
    terminal.show("\u4f60")
    terminal.note("\u4f60")
    assert main(["perplexity", str(tmp_path / "\u597d.txt")]) == 1
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in (sys.stdout, sys.stderr))
    accent = "?" if encoding == "ascii" else "\u00e9"
    assert out == f"caf{accent} ? ?\n?\n"
    assert err.startswith("?\n")
    assert "?.txt cannot be read" in err


def test_generation_goes_on_in_an_ascii_terminal():
    prompt = "# \u4f60\u597d\uff0c\u4e16\u754c\n# \u4f60\u597d\uff0c\u4e16"
    args = ("generate", prompt, "-n", "12", "--temperature", "0", *QUICK)
    whole = shell("", *args, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    ascii_only = shell("", *args, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0, ascii_only.stderr
    assert ascii_only.stdout == "".join(c if c < "\x80" else "?" for c in whole.stdout)


def test_a_prompt_in_utf_8_is_taken_in_an_ascii_locale():
    code = "import sys; from qwen3_moe_jax.commands import options; print(ascii(options.text(sys.argv[1])))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, "caf\u00e9 \u4f60".encode()]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=SECONDS)
    assert done.stdout == "'caf\\xe9 \\u4f60'\n", done.stderr


# Control characters


def test_what_a_file_says_cannot_forge_a_line(hostile_model, capsys):
    assert main(["inspect", str(hostile_model)]) == 0
    shown = capsys.readouterr().out
    assert controls(shown) == set()
    assert f"general.name = {ESCAPED}" in shown
    assert r"model\x1b[31m.gguf" in shown
    assert main(["generate", "x", "-n", "1", *QUICK[:-1], "-m", str(hostile_model)]) == 0
    shown = capsys.readouterr()
    assert controls(shown.err) == set()
    assert shown.err.startswith(ESCAPED)
    assert main(["doctor", "-m", str(hostile_model)]) in (0, 1)
    assert controls(capsys.readouterr().out) == set()


def test_a_name_in_an_error_or_a_trace_is_escaped(hostile_model, tmp_path, capsys):
    assert main(["inspect", f"{tmp_path}/no\x1b[31m\nsuch.gguf"]) == 1
    shown = capsys.readouterr().err
    assert controls(shown) == set()
    assert shown.count("\n") == 1
    picture = tmp_path / "a\x1b[31m.png"
    args = ["experts", "x = 1", "-o", str(picture), "-m", str(hostile_model), *QUICK]
    assert main(args) == 0
    assert controls(capsys.readouterr().out) == set()
    assert picture.exists()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_text_of_the_model_is_raw_in_a_pipe_and_escaped_on_a_terminal(is_terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.show_text("a\tb\n\x1b[2J\r\x9b\u202e\u2066\u2028\U0001f469\u200d\U0001f4bb")
    escaped = "a\tb\n\\x1b[2J\\r\\x9b\\u202e\\u2066\\u2028\U0001f469\u200d\U0001f4bb"
    raw = "a\tb\n\x1b[2J\r\x9b\u202e\u2066\u2028\U0001f469\u200d\U0001f4bb"
    assert stream.getvalue() == (escaped if is_terminal else raw)


# Readers that go away, disks that are full


@pytest.mark.parametrize(
    "args", [("inspect", "--tensors"), ("--help",), ("verify", "--contract"), GENERATE, ("inspect", "--json")]
)
def test_a_reader_that_goes_away_ends_the_program_silently(args):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*PROGRAM, *args], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=SECONDS
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_notes_that_nobody_reads_do_not_stop_the_work():
    reader, writer = os.pipe()
    os.close(reader)
    args = [*PROGRAM, *GENERATE[:-1]]
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=writer, text=True, timeout=SECONDS)
    os.close(writer)
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.parametrize("args", [("inspect",), GENERATE, ("inspect", "--json")])
def test_a_full_disk_is_reported(args):
    done = shell(">/dev/full", *args)
    assert done.returncode == 6
    assert done.stderr == "qwen3-moe: standard output cannot be written: No space left on device\n"
    assert shell("2>/dev/full", *args).returncode == 0


# Streams that are not there


ALL = "<&- >&- 2>&-"


@pytest.mark.parametrize(
    ("args", "closed"),
    [
        (("inspect",), "<&-"),
        (("inspect",), ">&-"),
        (("inspect",), "2>&-"),
        (GENERATE, ">&-"),
        (GENERATE, "2>&-"),
        (GENERATE, ALL),
        (("doctor",), ALL),
        (("chat", *QUICK), "<&-"),
        (("chat", *QUICK), ALL),
        (("perplexity", "SMALL", "-c", "8", *QUICK), ALL),
        (("experts", "x = 1", "--json", *QUICK), ALL),
        (("trace", "x = 1", *QUICK), ALL),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_closed_stream_is_no_fault(args, closed, tmp_path):
    (tmp_path / "SMALL").write_text("import os\nimport sys\n" * 4)
    path = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    done = shell(
        closed, *args, stdin=subprocess.DEVNULL, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_streams_that_are_none_are_no_fault_in_any_command(monkeypatch):
    """As under pythonw: each command's help, and a fault."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert main([command, "--no-such-option"]) == 2
    assert main(["generate", "-", *QUICK]) == 2


def test_closed_streams_do_not_give_their_numbers_to_files(tmp_path):
    """What a library writes to "standard error" must not go into a result."""
    code = (
        "import os; from qwen3_moe_jax.core import terminal; terminal.guard_streams(); "
        f"file = open({str(tmp_path / 'result')!r}, 'w'); print(file.fileno())"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$CODE" 2>&- <&-'],
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert int(done.stdout) > 2


# Input


@pytest.mark.parametrize(
    "args", [("generate", "-", *QUICK), ("perplexity", "-", *QUICK), ("experts", "-", *QUICK)]
)
def test_input_that_is_not_utf_8_is_named(args):
    done = subprocess.run([*PROGRAM, *args], input=b"ab\xff", capture_output=True, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr == b"qwen3-moe: standard input is not UTF-8 (byte 2)\n"


def test_chat_skips_a_line_that_is_not_utf_8():
    done = subprocess.run(
        [*PROGRAM, "chat", "-n", "2", *QUICK], input=b"\xff\nhi\n", capture_output=True, timeout=SECONDS
    )
    assert done.returncode == 0
    assert done.stderr == b"qwen3-moe: standard input is not UTF-8 (byte 0)\n"
    assert done.stdout


def test_input_that_cannot_be_read_is_named():
    done = shell("0>/dev/null", "generate", "-", *QUICK)
    assert done.returncode == 1
    assert done.stderr.startswith("qwen3-moe: standard input cannot be read")


# Progress


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still unless it is moved."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


def test_the_clock_of_a_load_starts_with_its_first_byte(clock, capsys):
    with terminal.show_progress("loading") as report:
        clock.now += 60  # JAX is imported
        for seconds, done in ((0, 1), (1.5, 1.5), (3, 1.6), (5, 1.7), (2, 4), (5, 7), (0, 8)):
            clock.now += seconds
            report(int(done * 10**9), 8 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "loading: 1.50 GB of 8.00 GB, 333.3 MB/s, 20 s left",
        "loading: 1.70 GB of 8.00 GB, 73.7 MB/s, 86 s left",
        "loading: 7.00 GB of 8.00 GB, 363.6 MB/s, 3 s left",
    ]


def test_a_short_load_says_nothing(clock, capsys):
    with terminal.show_progress("loading") as report:
        clock.now += 60  # JAX is imported
        for done in range(0, 14):
            report(done * 10**6, 14 * 10**6)
            clock.now += 0.07
        clock.now += 5  # a program is compiled
        report(14 * 10**6, 14 * 10**6)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("gate", [[], ["--no-gate"]], ids=str)
def test_a_slow_load_speaks_of_the_check_where_there_is_one(gate, monkeypatch):
    from qwen3_moe_jax.jax_backend.compile_clock import compile_clock

    said = []

    @contextmanager
    def at_once(text, **_):
        with compile_clock().waiting("forward"):
            said.append(text())
        yield

    monkeypatch.setattr(common, "explain_if_slow", at_once)
    parser = ArgumentParser()
    common.add_model_arguments(parser)
    common.load_model(parser.parse_args(["-q", "--backend", "reference", *gate])).close()
    assert ["compiling a program" in line for line in said] == [True]
    assert ["checked" in line for line in said] == [not gate]


def test_no_time_is_told_before_a_tenth_or_three_seconds(clock, capsys):
    with terminal.show_progress("loading") as report:
        for seconds, done in ((0, 0.0), (2, 0.2), (5, 0.4)):
            clock.now += seconds
            report(int(done * 10**9), 8 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "loading: 200.0 MB of 8.00 GB, 100.0 MB/s",
        "loading: 400.0 MB of 8.00 GB, 57.1 MB/s, 133 s left",
    ]


def test_quiet_progress_says_nothing_and_a_terminal_gets_a_bar(clock, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    for quiet in (True, False):
        assert not stream.getvalue()
        with terminal.show_progress("a[bold]\x1b[2J", quiet=quiet) as report:
            report(0, 2 * 10**9)
            clock.now += 2
            report(10**9, 2 * 10**9)
    assert "1.0/2.0 GB" in stream.getvalue()
    assert r"a[bold]\x1b[2J" in stream.getvalue()


# The end


def test_generations_left_unfinished_say_nothing_at_exit():
    code = (
        "import qwen3_moe_jax as q3; model = q3.load(backend='jax', gate=False, max_context=64)\n"
        "streams = [model.stream('x =', max_tokens=30, temperature=0) for _ in range(2)]\n"
        "print([next(stream) for stream in streams])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")


# The rule


def test_no_other_module_touches_the_streams():
    """``print`` is ruff's business; this is about sys.stdout and its like."""
    package = Path(terminal.__file__).parents[1]
    workers = {
        f"{name}_worker.py" for name in ("text/template", "jax_backend/program", "parity/crew")
    }  # a protocol
    allowed = {"core/terminal.py", "core/speaker.py", *workers}
    words = ("sys.stdout", "sys.stderr", "sys.stdin", 'input("', "input('", "Console(")
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if name not in allowed and not name.startswith("testing/"):
            found = [word for word in words if word in path.read_text()]
            assert not found, f"{name}: {found}"

"""Signals in the middle of an answer: what is written stays, the terminal is as it was, and no traceback."""

import os
import signal
import termios

import pytest

from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.testing import terminal
from qwen3_moe_jax.testing.terminal import Terminal

QUICK = ("--backend", "reference", "--no-gate")
ENDLESS = ("-n", "3000", "--temperature", "0", "--repetition-penalty", "1", *QUICK)
READY = r"\x1b\[\?2004h[^>]*>[^\n]*\x1b\[\?25h"
CODES = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.HUNG_UP,
}


@pytest.mark.parametrize("number", CODES)
def test_an_answer_that_is_ended_keeps_its_text(number, tmp_path):
    path = tmp_path / "answer.txt"
    with path.open("wb") as file:
        process = terminal.start("generate", *ENDLESS, "abc", stdout=file)
        while path.stat().st_size < 20:
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        said = process.communicate(timeout=terminal.SECONDS)[1]
    assert process.returncode == CODES[number], said
    assert "Traceback" not in said
    assert len(path.read_text()) >= 20


def chat_with_an_editor(state, **options):
    """A chat at a terminal that can move its cursor, and that terminal's settings."""
    environment = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(state)}
    chat = Terminal("chat", "-q", *ENDLESS, **options, **environment)
    return chat, termios.tcgetattr(chat.master)


def assert_ended_by(number, chat, before):
    """It has the signal's exit code, shows no traceback and gives the terminal back."""
    if number == signal.SIGINT:  # the first one clears the line
        chat.until("leaves")
        chat.until(READY)
        os.kill(chat.process.pid, number)
    code = chat.process.wait(timeout=terminal.SECONDS)
    after = termios.tcgetattr(chat.master)
    chat.exit_code()
    assert code == CODES[number]
    assert b"Traceback" not in chat.all
    assert after[:4] == before[:4]


@pytest.mark.parametrize("number", CODES)
def test_an_ending_at_the_prompt_gives_the_terminal_back(number, tmp_path):
    """The prompt's editor has changed the terminal's settings: the next program must not find them. What was
    entered is in the history."""
    chat, before = chat_with_an_editor(tmp_path)
    chat.until(READY)
    chat.press("/system be kind\r")
    chat.until("be kind")
    chat.until(READY)
    assert termios.tcgetattr(chat.master)[3] != before[3], "the editor is at work"
    os.kill(chat.process.pid, number)
    assert_ended_by(number, chat, before)
    (history,) = tmp_path.rglob("chat-history")
    assert "+/system be kind\n" in history.read_text()


@pytest.mark.parametrize("number", CODES)
def test_an_ending_within_the_editor_is_not_its_fault(number, tmp_path):
    """A signal that comes while one of the editor's callbacks runs: the editor reports no fault, waits for no
    key, and gives the terminal back."""
    first = (
        "import os\nfrom prompt_toolkit.history import FileHistory\n"
        f"FileHistory.load_history_strings = lambda self: os.kill(os.getpid(), {int(number)}) or []"
    )
    chat, before = chat_with_an_editor(tmp_path, first=first)
    assert_ended_by(number, chat, before)
    assert b"ENTER" not in chat.all


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup: the terminal goes, and the answer comes to its end."""
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {terminal.START}"
    process = terminal.start("generate", "-q", *ENDLESS[2:], "-n", "60", "abc", code=code)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGHUP)
    out, said = process.communicate(timeout=terminal.SECONDS)
    assert process.returncode == ExitCode.DONE, said
    assert len(first + out) > 20


def test_an_ending_does_not_wait_for_what_never_ends():
    """The child waits in C for ever, as in a compiler: no Python code of its main thread runs."""
    code = (
        "import ctypes, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qwen3_moe_jax.core import interrupts\n"
        "interrupts.SECONDS_TO_END = 0.2\n"
        "mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock\n"
        "lock(mutex)\n"
        "with interrupts.handled():\n"
        "    print('ready', flush=True)\n"
        "    lock(mutex)\n"
    )
    child = terminal.start(code=code)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=terminal.SECONDS) == ExitCode.TERMINATED


@pytest.mark.parametrize("number", CODES)
def test_a_server_drains_at_each_of_them(number):
    pytest.importorskip("uvicorn")
    process = terminal.start("serve", "--port", "0", "--context", "64", "--no-warm-up", *QUICK)
    said = ""
    while "ready: " not in said:
        said += (line := process.stderr.readline())
        assert line, said
    process.send_signal(number)
    said = process.communicate(timeout=terminal.SECONDS)[1]
    assert process.returncode == ExitCode.DONE, said
    assert "Traceback" not in said

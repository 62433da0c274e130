"""Ctrl-C: an answer stops and the conversation stays; anything else ends with one line and exit code 130."""

import gc
import os
import signal
import time

import pytest

from qwen3_moe_jax import cli
from qwen3_moe_jax.core import interrupts
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.testing.terminal import SECONDS, Terminal, start

QUICK = ("--backend", "reference", "--no-gate")
GREEDY = ("--temperature", "0", "--repetition-penalty", "1")


@pytest.fixture(autouse=True)
def python_handler():
    """Python's own handler before and after, whatever the suite inherited."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)  # the handler runs between two instructions


# The mechanism


def test_the_first_interrupt_is_a_flag_and_the_second_raises():
    with interrupts.handled(), interrupts.as_flag() as is_stopped:
        assert not is_stopped()
        press()
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            press()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_flag_an_interrupt_raises():
    with interrupts.handled(), pytest.raises(KeyboardInterrupt):
        press()


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.handled():
        press()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupt_that_a_gc_callback_swallows_comes_again():
    """As JAX's callback does; Python prints and drops what a callback raises."""
    pressed = []

    def callback(phase, info):
        if not pressed:
            pressed.append(phase)
            press()

    def collect_and_wait():
        gc.callbacks.append(callback)  # not before: a collection may come at any time
        gc.collect()
        assert pressed
        time.sleep(SECONDS)

    try:
        with interrupts.handled(), pytest.raises(KeyboardInterrupt):
            collect_and_wait()
    finally:
        gc.callbacks.remove(callback)


def test_a_system_that_gives_no_more_threads_is_one_line(monkeypatch, capsys):
    """The first of a command is the one that hears of Ctrl-C: without it the work goes on."""

    def refuses(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(interrupts.threading.Thread, "start", refuses)
    with interrupts.handled():
        pass
    assert cli.main(["generate", "--backend", "jax", "-n", "1", "x"]) == ExitCode.MEMORY
    line = "qwen3-moe: the system gives this process no more threads: raise the limit (ulimit -v, "
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_what_blocks_an_interrupt_is_named_and_the_next_one_ends_the_program():
    """The child waits in C for ever, as in a compiler: no Python code of its main thread runs."""
    code = (
        "import ctypes, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qwen3_moe_jax.core import interrupts\n"
        "interrupts.WAITS.append(lambda: 'a program is being compiled')\n"
        "mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock\n"
        "lock(mutex)\n"
        "with interrupts.handled(), interrupts.as_flag():\n"
        "    print('ready', flush=True)\n"
        "    lock(mutex)\n"
    )
    child = start(code=code)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.stderr.readline() == "\n"
    expected = "a program is being compiled: waiting for its end; Ctrl-C again ends the program at once\n"
    assert child.stderr.readline() == expected
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=SECONDS) == 130


# The commands


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", "--sha256"),
        ("verify", "--backend", "reference"),
        ("perplexity", "-", "-c", "64", *QUICK),
        ("generate", "-", *QUICK),
        ("bisect", "reference"),
        ("experts", "-", "--json", *QUICK),
    ],
    ids=lambda args: args[0],
)
def test_each_command_ends_with_one_line(args, monkeypatch, capsys):
    """The interrupt comes when the model's file is opened, or before, when input is read."""
    from qwen3_moe_jax import cli, loader
    from qwen3_moe_jax.core import terminal

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loader, "embedded_model", interrupted)
    monkeypatch.setattr(terminal, "read_text", interrupted)
    assert cli.main(list(args)) == 130
    assert capsys.readouterr().err == "qwen3-moe: interrupted\n"


PROMPT = r"(^|\n)> \Z"


def test_ctrl_c_in_chat_stops_the_answer_and_keeps_the_conversation():
    chat = Terminal("chat", "-q", "-n", "3000", "--thinking", "off", *GREEDY, *QUICK)
    chat.until(PROMPT)
    chat.press("abc\x03")
    chat.until("Ctrl-C again, Ctrl-D or /exit leaves")
    chat.until(PROMPT)
    chat.press("write a loop\r")
    chat.until(r"loop\r\n.")
    chat.press("\x03")
    chat.until(PROMPT)
    chat.press("again\r")
    chat.until(r"again\r\n.")
    chat.press("\x03")
    chat.until(PROMPT)
    chat.press("\x03")
    chat.until("leaves")
    chat.until(PROMPT)
    chat.press("\x03")
    assert chat.exit_code() == 130

"""Narrow terminals: what is shown fits, or is cut where a line ends, and nothing fails."""

import re

import pytest

from qwen3_moe_jax.testing.terminal import Terminal

QUICK = ("--backend", "reference", "--no-gate")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COMMANDS = {
    "inspect": ("inspect",),
    "experts": ("experts", "def f(x):", "-o", "{folder}/experts.png", *QUICK),
    "models": ("models",),
    "generate": ("generate", "-n", "8", "--temperature", "0", "def f(x):", *QUICK),
    "doctor": ("doctor",),
    "bench": ("bench", "-p", "8", "-n", "2", "-d", "-r", "1", *QUICK),
}


@pytest.mark.parametrize("columns", [40, 20])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_in_a_narrow_terminal(name, columns, tmp_path):
    environment = {"COLUMNS": str(columns), "HF_HOME": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    words = [word.format(folder=tmp_path) for word in COMMANDS[name]]
    shown = Terminal(*words, size=(24, columns), **environment)
    assert shown.exit_code() == 0, shown.all.decode(errors="replace")
    text = shown.all.decode()
    assert "Traceback" not in text
    assert re.sub(r"\s", "", text), "nothing is shown"
    passing = re.findall(r"[^\r\n]*\r(?!\n)", ESCAPES.sub("", text))  # what is written over must be one row
    assert all(len(line.strip()) <= columns for line in passing), passing


@pytest.mark.parametrize("columns", [40, 20])
def test_a_chat_works_in_a_narrow_terminal(columns, tmp_path):
    environment = {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path)}
    chat = Terminal("chat", "-n", "30", "--temperature", "0", *QUICK, size=(24, columns), **environment)
    ready = r"\x1b\[\?2004h[^>]*>[^\n]*\x1b\[\?25h"
    chat.until(ready)
    chat.press("def a_name_that_is_long(one, two):\r")
    chat.until(ready)
    chat.press("/stats\r")
    chat.until("tokens")
    chat.until(ready)
    chat.press("/exit\r")
    assert chat.exit_code() == 0
    assert b"Traceback" not in chat.all

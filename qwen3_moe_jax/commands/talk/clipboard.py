"""Text to the clipboard: by the system's own program, else by asking the terminal (OSC 52)."""

import base64
import re
import shutil
import subprocess

from qwen3_moe_jax.core import terminal

PROGRAMS = (
    ("pbcopy",),
    ("wl-copy",),
    ("xclip", "-selection", "clipboard"),
    ("xsel", "--clipboard", "--input"),
    ("clip.exe",),
)

LONGEST = 74_994
"""Bytes that terminals take by OSC 52 (xterm's limit of 100,000 characters of base64)."""


def copy(text: str) -> str | None:
    """Copies a text; says how, or None where there is no way."""
    for program in PROGRAMS:
        if shutil.which(program[0]) and _run(program, text):
            return program[0]
    content = text.encode()
    if not terminal.can_style() or len(content) > LONGEST:
        return None
    terminal.control(f"\x1b]52;c;{base64.b64encode(content).decode()}\x07")
    return "the terminal"


def _run(program: tuple[str, ...], text: str) -> bool:
    """False where it fails: no display, say."""
    try:
        silent = subprocess.DEVNULL
        done = subprocess.run(program, input=text.encode(), stdout=silent, stderr=silent, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def last_code(text: str) -> str | None:
    """The last fenced block of code in a Markdown text, or None."""
    blocks = re.findall(r"^(`{3,}|~{3,})[^\n]*\n(.*?)^\1`*~*\s*$", text, re.MULTILINE | re.DOTALL)
    return blocks[-1][1] if blocks else None

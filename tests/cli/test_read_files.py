"""Files that an option names to be read: a pipe, a device or a folder is refused; long names are cut."""

import os
import re
import sys

import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.input_file import read_text
from qwen3_moe_jax.inspection.trace import Trace

READS = [
    ("generate", "x", "--chat", "--chat-template-file", "FILE"),
    ("generate", "x", "--chat", "--tools", "FILE"),
    ("generate", "--file", "FILE"),
    ("chat", "--load", "FILE"),
    ("perplexity", "FILE"),
    ("experts", "--file", "FILE"),
    ("experts", "--against-file", "FILE"),
    ("bisect", "FILE"),
    ("inspect", "FILE"),
    ("convert", "FILE", "out"),
    ("serve", "--api-key-file", "FILE"),
    ("batch", "FILE", "-o", "out.jsonl"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes in its folders")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", READS, ids=" ".join)
@pytest.mark.usefixtures("no_load")
def test_a_pipe_and_a_device_are_refused_at_once(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    for name in ("pipe", "/dev/zero"):
        assert main([name if word == "FILE" else word for word in command]) in (1, 2)
        shown = capsys.readouterr()
        assert not shown.out
        lines = [line for line in shown.err.splitlines() if name in line]
        assert len(lines) == 1
        assert "regular file" in lines[0] or "no file" in lines[0]
    assert os.listdir() == ["pipe"]


def test_a_file_that_cannot_be_read_is_one_line_that_names_it(tmp_path):
    cases = {"no": "No such file", ".": "it is a folder", "a\0b": "null"}
    for name, problem in cases.items():
        with pytest.raises(OSError, match=problem) as caught:
            read_text(f"{tmp_path}/{name}")
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + bytes(40), b"\x93NUMPY", b"text"])
def test_what_is_no_trace_is_named(content, tmp_path):
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.npz is no recorded trace"):
        Trace.load(tmp_path / "t.npz")


LONG = "n" * 5000


@pytest.mark.parametrize("length", [300, 5000])
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x", "-m"),
        ("inspect",),
        ("doctor", "-m"),
        ("bisect",),
        ("bisect", "--against"),
        ("verify", "-m"),
        ("serve",),
        ("experts", "x", "-m"),
        ("perplexity", __file__, "--against"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("no_load")
def test_a_name_that_no_file_can_have_is_one_line_that_names_it_in_short(command, length, capsys):
    assert main([*command, "n" * length]) in (1, 2)
    shown = "".join(capsys.readouterr())
    lines = [line for line in shown.splitlines() if "nnn" in line]
    assert len(lines) == 1
    assert len(lines[0]) < 400
    assert "Errno" not in shown
    assert re.search(r"nn: cannot be opened: File name too long|nn' is no backend ", lines[0])


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x", "-m", LONG),
        ("generate", "x", "-m", "/".join([LONG[:200]] * 25)),
        ("generate", "x", "-m", f"hf:{LONG}"),
        ("generate", "x", "-m", f"https://example.org/{LONG}"),
        ("generate", "x", "--file", LONG),
        ("generate", "x", f"--{LONG}"),
        ("generate", "x", "--top-p", LONG),
        ("generate", "x", "--backend", LONG),
        ("generate", "x", "--mesh", LONG),
        ("generate", *("word " * 1000).split()),
        ("trace", "x", "--payload", f"/no/{LONG}/t.npz"),
        ("bisect", LONG),
        ("inspect", LONG),
        ("convert", LONG, "out"),
        ("serve", "--api-key-file", LONG),
        ("batch", LONG, "-o", "out.jsonl"),
        (LONG,),
    ],
    ids=lambda command: " ".join(command)[:40],
)
@pytest.mark.usefixtures("no_load")
def test_a_name_of_5000_characters_is_not_printed_whole(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(list(command)) in (1, 2)
    shown = capsys.readouterr().err
    assert 0 < len(shown) < 2500
    assert "\n" not in shown.splitlines()[-1]


def test_both_ends_of_a_long_line_are_kept():
    line = terminal.in_short(f"tensor {LONG} is missing: {LONG} download the file again")
    assert line.startswith("tensor nnn")
    assert line.endswith("download the file again")
    assert len(line) < 800
    assert len(terminal.in_short("word " * 2000)) < 1600
    assert terminal.in_short("a \x1b[31m short line") == "a \\x1b[31m short line"

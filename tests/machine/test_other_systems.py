"""Systems that are not here, as far as they can be faked: without POSIX' modules and calls, or with Metal."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qwen3_moe_jax import cli, loader
from qwen3_moe_jax.commands import serve
from qwen3_moe_jax.core.exit_codes import ExitCode

WITHOUT_POSIX = """
import os, sys
# the libraries have ways of their own for Windows, which are not what is tested
import importlib.metadata, subprocess, tempfile
import filelock, jinja2, numpy, platformdirs, psutil, rich.console, tokenizers
for name in ("fcntl", "termios", "resource", "pwd", "grp", "pty", "tty", "syslog"):
    sys.modules[name] = None
for name in ("preadv", "pread", "pwritev", "geteuid", "getuid", "getloadavg", "sched_getaffinity", "mkfifo",
             "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_DIRECTORY", "openpty", "set_blocking"):
    vars(os).pop(name, None)
from qwen3_moe_jax.cli import main
quick = ["--backend", "reference", "--no-gate", "-q"]
for command in (
    ["generate", "def f(x):", "-n", "2", *quick],
    ["inspect", "--no-estimates"],
    ["experts", "x = 1", "--json", *quick],
    ["trace", "x = 1", "--stage", "l_out", "--payload", "t.npz", *quick],
    ["generate", "--chat", "hi", "-n", "2", *quick],
    ["chat", "-n", "2", *quick],
):
    code = main(command)
    assert not code, (command, code)
print("done")
"""


def test_commands_need_nothing_of_posix(tmp_path):
    """As on Windows: no fcntl, no pread, no user ids, none of the flags of open."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "QWEN3_MOE_DEBUG": "1"},
        input="hi\n/save c.json\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
    assert (tmp_path / "c.json").is_file()


@pytest.mark.parametrize("command", ["serve", "batch"])
def test_what_windows_lacks_is_one_line(command, monkeypatch, tmp_path, capsys):
    """The engine inherits a socket, which Windows has no way for."""
    monkeypatch.setattr(serve.sys, "platform", "win32")
    (tmp_path / "r.jsonl").write_text("{}\n")
    arguments = [str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "o.jsonl")] if command == "batch" else []
    assert cli.main([command, *arguments]) == ExitCode.FAULT
    assert capsys.readouterr().err == f"qwen3-moe: {serve.NO_WINDOWS}\n"


def test_a_mac_takes_its_gpu_through_webgpu(monkeypatch):
    metal = SimpleNamespace(software=False, summary="Apple M3 Max (Metal)")
    monkeypatch.setattr(loader, "nvidia_gpus", lambda: ())
    monkeypatch.setattr(loader, "may_have_hardware", lambda: True)
    monkeypatch.setattr(loader, "list_adapters", lambda: [metal])
    choice = loader.choose_backend()
    assert (choice.backend, choice.fallbacks) == ("wgpu", ())
    assert choice.reason == "no NVIDIA GPU; WebGPU adapter Apple M3 Max (Metal)"

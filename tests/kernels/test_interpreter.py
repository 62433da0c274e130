"""The interpreter has threads for all warpgroups that wait for each other, or says so instead of a hang."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_moe_jax.kernels_pallas.gpu import interpreter

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "NPROC"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_threads_are_made_where_jax_has_not_started():
    done = in_a_process(
        "import jax; from qwen3_moe_jax.kernels_pallas.gpu import interpreter\n"
        "interpreter.ask_for_threads(); jax.numpy.zeros(1)\n"
        "assert interpreter._threads() == interpreter.THREADS, interpreter._threads()\n"
        "interpreter.require_threads(5)",
        NPROC="2",
    )
    assert done.returncode == 0, done.stderr


def test_jax_that_was_started_with_too_few_is_an_error_that_names_nproc():
    done = in_a_process(
        "import jax; jax.numpy.zeros(1); from qwen3_moe_jax.kernels_pallas.gpu import interpreter\n"
        "interpreter.require_threads(2); interpreter.require_threads(3)",
        NPROC="3",
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: JAX was started with 3 CPU threads, and Pallas'")
    assert "needs 4 for 3 warpgroups" in last
    assert "NPROC=16" in last


@pytest.mark.parametrize(("before", "after"), [(None, "16"), ("2", "16"), ("nonsense", "16"), ("64", "64")])
def test_what_the_user_asked_for_is_only_raised(monkeypatch, before, after):
    monkeypatch.setattr(interpreter, "_has_started", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("NPROC", raising=False)
    if before is not None:
        monkeypatch.setenv("NPROC", before)
    interpreter.ask_for_threads()
    assert os.environ["NPROC"] == after


def test_this_process_has_threads_for_every_kernel():
    interpreter.require_threads(5)


def test_a_kernel_asks_for_its_warpgroups(monkeypatch):
    monkeypatch.setattr(interpreter, "_has_started", lambda: True)
    monkeypatch.setattr(interpreter, "_threads", lambda: 3)
    assert interpreter.interpreter_option(None, 9) == {}
    assert interpreter.interpreter_option("parameters", 2) == {"interpret": "parameters"}
    with pytest.raises(RuntimeError, match="3 CPU threads"):
        interpreter.interpreter_option("parameters", 3)


def test_every_kernel_asks_for_its_warpgroups():
    """A user's own script too runs into no hang: no kernel reaches the interpreter by another way."""
    sources = {path: path.read_text() for path in (ROOT / "kernels_pallas").rglob("*.py")}
    kernels = {path.name: text for path, text in sources.items() if "plgpu.kernel(" in text}
    assert len(kernels) >= 3
    assert all("**interpreter_option(" in text for text in kernels.values())


def test_a_system_that_shows_no_threads_is_not_refused(monkeypatch):
    monkeypatch.setattr(interpreter, "_has_started", lambda: True)
    monkeypatch.setattr(interpreter, "_POOL_THREAD", "another name")
    interpreter.require_threads(99)

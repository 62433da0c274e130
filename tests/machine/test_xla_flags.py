"""Flags that XLA does not know end a process: they are met before, in one line that names the variable."""

import os
import subprocess
import sys

import pytest

from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.machine import xla_flags
from qwen3_moe_jax.machine.jax_devices import jax_devices
from qwen3_moe_jax.machine.probe import Machine, diagnose

GOOD = "--xla_force_host_platform_device_count=1"


@pytest.fixture(autouse=True)
def before_jax_starts(monkeypatch, tmp_path):
    """As a process in which JAX has not started, with a cache of its own."""
    monkeypatch.setattr(xla_flags, "_has_started", lambda: False)
    monkeypatch.setenv("QWEN3_MOE_CACHE", str(tmp_path))
    xla_flags._refusal.cache_clear()
    yield
    xla_flags._refusal.cache_clear()


@pytest.fixture
def trials(monkeypatch):
    """The trials that are run."""
    run, seen = xla_flags._try, []
    monkeypatch.setattr(xla_flags, "_try", lambda: seen.append(os.environ["XLA_FLAGS"]) or run())
    return seen


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--xla_nonsense=1", "Unknown flag in XLA_FLAGS: --xla_nonsense=1"),
        ("--xla_cpu_enable_fast_math=foo", "Couldn't interpret value foo for flag xla_cpu_enable_fast_math"),
        ("/no/such/file", 'Could not open file "/no/such/file"'),
    ],
)
def test_a_flag_that_xla_refuses_is_one_line_that_names_the_variable(monkeypatch, flags, words):
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(BackendUnavailableError) as caught:
        jax_devices()
    line = str(caught.value)
    assert words in line
    assert line.endswith("correct XLA_FLAGS or unset it")
    assert "\n" not in line
    found = diagnose(Machine((3, 12), {"jax": "0.11.2"}, jax_error=line))[0]
    assert (found.level, found.advice) == ("problem", "correct XLA_FLAGS or unset it")


def test_flags_that_were_taken_are_not_tried_again(monkeypatch, trials):
    monkeypatch.setenv("XLA_FLAGS", GOOD)
    xla_flags.check_xla_flags()
    xla_flags._refusal.cache_clear()  # as in another process
    xla_flags.check_xla_flags()
    assert trials == [GOOD]


def test_a_file_of_flags_is_tried_again_when_it_changes(monkeypatch, tmp_path, trials):
    file = tmp_path / "flags"
    file.write_text(GOOD)
    monkeypatch.setenv("XLA_FLAGS", str(file))
    xla_flags.check_xla_flags()
    file.write_text("--xla_nonsense=1")
    with pytest.raises(BackendUnavailableError, match="xla_nonsense"):
        xla_flags.check_xla_flags()
    assert len(trials) == 2


def test_a_trial_that_cannot_run_stops_nobody(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", GOOD)
    monkeypatch.setattr(xla_flags.sys, "executable", "/no/such/python")
    xla_flags.check_xla_flags()


@pytest.mark.parametrize("flags", [None, "", " "])
def test_nothing_is_tried_without_flags(monkeypatch, trials, flags):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if flags is not None:
        monkeypatch.setenv("XLA_FLAGS", flags)
    xla_flags.check_xla_flags()
    assert not trials


def test_the_process_does_not_end():
    code = (
        "import qwen3_moe_jax as q3\n"
        "try: q3.load(backend='jax')\n"
        "except q3.BackendUnavailableError as error: print(error)\n"
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_nonsense=1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("JAX does not start with XLA_FLAGS (Unknown flag"), done.stderr

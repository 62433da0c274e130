"""A hang inside C++ ends its test, with the stacks, and not the run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TESTS = """
import ctypes
import pytest

def test_before():
    pass

@pytest.mark.timeout(3)
def test_that_hangs():
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    c.pthread_mutex_init(mutex, None)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)  # waits for itself, and no signal handler of Python's runs

def test_after():
    pass
"""


def test_a_hang_inside_a_library_ends_that_test_alone(tmp_path):
    (tmp_path / "test_planted.py").write_text(TESTS)
    options = [
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-n",
        "1",
        "--dist",
        "worksteal",
        "-v",
        "-rfE",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_planted.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("before", "after"):
        assert f"PASSED test_planted.py::test_{name}" in done.stdout
    assert "FAILED test_planted.py::test_that_hangs" in done.stdout
    assert "in test_that_hangs" in done.stderr  # the stack
    assert "1 failed, 2 passed" in done.stdout

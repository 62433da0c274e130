"""The reader's own tests go through at least 98 % of its lines and branches.

By hand, with the lines that are missing:

    python -m coverage run --branch --include='convert/gguf_*.py,convert/regular_file.py' -m pytest -q \\
        tests/convert/test_gguf_*.py tests/convert/test_truncation.py
    python -m coverage report -m --fail-under=98
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("coverage")

ROOT = Path(__file__).resolve().parents[2]
READER = "*/convert/gguf_file.py,*/convert/gguf_header.py,*/convert/gguf_cursor.py,*/convert/regular_file.py"
TESTS = [
    f"tests/convert/{name}.py"
    for name in (
        "test_gguf_file",
        "test_gguf_limits",
        "test_gguf_shards",
        "test_gguf_bad_files",
        "test_truncation",
        "test_regular_file",
    )
]
# Timings and memory mean nothing under a tracer; the children are not measured.
LEFT_OUT = "not 2M and not real_size and not under_optimization and not test_truncated_while_loading"


def coverage(*arguments: str, data_file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coverage", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "COVERAGE_FILE": str(data_file),
            "PYTEST_ADDOPTS": "-p no:xdist -p no:cacheprovider",
        },
        capture_output=True,
        text=True,
        timeout=800,
    )


def test_branch_coverage_of_the_reader(tmp_path: Path):
    data_file = tmp_path / "coverage"
    options = ["--branch", f"--include={READER}", "-m", "pytest", "-q", *TESTS, "-k", LEFT_OUT]
    tests = coverage("run", *options, data_file=data_file)
    assert tests.returncode == 0, tests.stdout
    report = coverage("report", "-m", "--fail-under=98", data_file=data_file)
    assert report.returncode == 0, report.stdout
    assert all(name.removeprefix("*/") in report.stdout for name in READER.split(","))

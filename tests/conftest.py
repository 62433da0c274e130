"""What every test runs under."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

SKIPPED: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "smoke: the small set that also runs on the oldest supported Python")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; the only tests that may be skipped without one")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "gpu" not in report.keywords and not hasattr(report, "wasxfail"):
        SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test has not passed: with QWEN3_MOE_NO_SKIPS=1 it fails the run."""
    if SKIPPED and os.environ.get("QWEN3_MOE_NO_SKIPS") == "1" and not hasattr(session.config, "workerinput"):
        print(f"\nQWEN3_MOE_NO_SKIPS: {len(SKIPPED)} skipped tests should have run:", *SKIPPED, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

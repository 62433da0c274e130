"""What every test runs under, and the models that many of them share."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

SKIPPED: list[str] = []


def _one_blas_thread() -> None:
    """Workers share the cores: BLAS threads that wait for each other make small products 40 times slower."""
    for library in (Path(np.__file__).parents[1] / "numpy.libs").glob("libscipy_openblas64*"):
        ctypes.CDLL(str(library)).scipy_openblas_set_num_threads64_(1)


def pytest_configure(config: pytest.Config) -> None:
    _one_blas_thread()
    config.addinivalue_line("markers", "smoke: the small set that also runs on the oldest supported Python")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU, and alone may be skipped without one")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "gpu" not in report.keywords and not hasattr(report, "wasxfail"):
        SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test has not passed: with QWEN3_MOE_NO_SKIPS=1 it fails the run."""
    if SKIPPED and os.environ.get("QWEN3_MOE_NO_SKIPS") == "1" and not hasattr(session.config, "workerinput"):
        print(f"\nQWEN3_MOE_NO_SKIPS: {len(SKIPPED)} skipped tests should have run:", *SKIPPED, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def source():
    """The embedded model, open."""
    from qwen3_moe_jax.convert.model_source import open_model
    from qwen3_moe_jax.loader import embedded_model

    with open_model(embedded_model()) as opened:
        yield opened


@pytest.fixture(scope="session")
def reference_runner(source):
    """The embedded model in NumPy, float32."""
    from qwen3_moe_jax.reference import ReferenceRunner

    return ReferenceRunner(source)


@pytest.fixture(scope="session")
def jax_runner(source):
    """The embedded model in JAX, float32."""
    from qwen3_moe_jax.jax_backend.runner import JaxRunner

    return JaxRunner(source)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Recorded logits of the embedded model: idsN, float32_logitsN (Transformers), llamacpp_logitsN,
    float32_greedyN (32 tokens), for three prompts N."""
    with np.load(Path(__file__).parent / "data" / "tiny-coder-golden.npz") as arrays:
        return dict(arrays)

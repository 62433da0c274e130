"""What every test runs under, and the models that many of them share.

Hangs. A test that waits inside C++ (a barrier of Pallas' interpreter, a driver) cannot be interrupted from
Python. So faulthandler's thread, which needs no lock of Python's, keeps the limits of pytest-timeout
(``timeout`` in pyproject.toml, ``@pytest.mark.timeout``): it writes the stacks of all threads to standard
error and ends the process. Under pytest-xdist (``scripts/test``) that process is a worker: the test is
reported as failed, and a new worker takes the tests that are left. This holds with ``--dist worksteal`` and
``load``; with ``loadgroup`` of pytest-xdist 3.8 the run stood still when a second worker had ended. Without
workers the run ends with the stacks. Limits are for hangs alone: no verdict depends on them.

Threads. ``ask_for_threads`` gives JAX more threads than a small machine has cores, before it starts.

Programs. Workers, and the processes that tests start, share compiled programs on disk.
"""

import ctypes
import faulthandler
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_moe_jax.kernels_pallas.gpu.interpreter import ask_for_threads

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["QWEN3_MOE_PROGRAMS"] = "off"  # tests patch code, and a program on disk has the key of the files
os.environ.pop("QWEN3_MOE_NATIVE", None)  # as a user has it, and compiled in a few seconds
ask_for_threads()

WORKER_BYTES = 5 * 2**30
"""Memory that a worker may take."""

NATIVE_FOLDER = Path(tempfile.gettempdir()) / f"qwen3-moe-tests-{os.getuid()}" / "native"

MAY_BE_SKIPPED = {"gpu", "browser", "ray"}
"""Markers of tests that need what not every machine can have; others must run where all is installed."""

SKIPPED: list[str] = []
STDERR = pytest.StashKey[int]()


def _one_blas_thread() -> None:
    """Workers share the cores: BLAS threads that wait for each other make small products 40 times slower."""
    for library in (Path(np.__file__).parents[1] / "numpy.libs").glob("libscipy_openblas64*"):
        ctypes.CDLL(str(library)).scipy_openblas_set_num_threads64_(1)


def _share_programs() -> None:
    """Compiled programs are kept in a folder that is this user's, unless the environment names another."""
    folder = Path(tempfile.gettempdir()) / f"qwen3-moe-tests-{os.getuid()}" / "xla"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def _hear_signals() -> None:
    """Programs that tests start end at signals also where this run ignores them (``nohup``, ``&``)."""
    for name, wanted in (("SIGHUP", signal.SIG_DFL), ("SIGINT", signal.default_int_handler)):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, wanted)


def pytest_configure(config: pytest.Config) -> None:
    _hear_signals()
    _one_blas_thread()
    _share_programs()
    config.stash[STDERR] = os.dup(2)  # pytest captures no output yet
    config.addinivalue_line("markers", "smoke: the small set that also runs on the oldest supported Python")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU, and may be skipped without one")
    config.addinivalue_line("markers", "browser: needs a Chromium, and may be skipped without one")
    config.addinivalue_line("markers", "ray: needs Ray, and may be skipped without it")


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """See above; True keeps pytest-timeout from its own timer."""
    faulthandler.dump_traceback_later(settings.timeout, exit=True, file=item.config.stash[STDERR])
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    faulthandler.cancel_dump_traceback_later()
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``: one worker for each core that this process may use, as many as fit the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory_limit() // WORKER_BYTES))


def memory_limit() -> int:
    """Bytes of the machine, or of its container if that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).is_file() else ""
        limits += [int(text)] if text.isdecimal() else []
    return min(limits)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not MAY_BE_SKIPPED & set(report.keywords) and not hasattr(report, "wasxfail"):
        SKIPPED.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skipped test has not passed: with QWEN3_MOE_NO_SKIPS=1 it fails the run."""
    if SKIPPED and os.environ.get("QWEN3_MOE_NO_SKIPS") == "1" and not hasattr(session.config, "workerinput"):
        print(f"\nQWEN3_MOE_NO_SKIPS: {len(SKIPPED)} skipped tests should have run:", *SKIPPED, sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def native():
    """The library of the CPU's own products, loaded; compiled once for all runs of the tests on a machine."""
    from qwen3_moe_jax.kernels_pallas.native import library

    found = library.start(NATIVE_FOLDER, 2)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def source():
    """The embedded model, open."""
    from qwen3_moe_jax.convert.open_model import open_model
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
    """The embedded model in JAX as a user has it: on a CPU, by its own kernels."""
    from qwen3_moe_jax.jax_backend.runner import JaxRunner

    return JaxRunner(source)


@pytest.fixture(scope="session")
def exact_runner(source):
    """The embedded model in JAX by XLA's float32 products, for bounds that 15-bit activations cannot keep."""
    from qwen3_moe_jax.jax_backend.runner import JaxRunner

    return JaxRunner(source, compute_dtype="float32")


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Recorded logits of the embedded model: idsN, float32_logitsN (Transformers), llamacpp_logitsN,
    float32_greedyN (32 tokens), for three prompts N."""
    with np.load(Path(__file__).parent / "data" / "tiny-coder-golden.npz") as arrays:
        return dict(arrays)

"""The GPU part of these tests runs in a process of its own: an abort there is a failed test here.

Without an adapter they are skipped with the reason, unless QWEN3_MOE_REQUIRE_WGPU=1 asks for failure.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from tests.wgpu import gpu_work

REQUIRED = os.environ.get("QWEN3_MOE_REQUIRE_WGPU") == "1"


class GpuProcess:
    """Calls functions of ``gpu_work`` in a spawned process that keeps its device and models."""

    def __init__(self) -> None:
        self._pool = self._new_pool()

    @staticmethod
    def _new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            self._pool = self._new_pool()
            pytest.fail(f"the GPU process died in {function.__name__}")

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(scope="session")
def gpu() -> Iterator[GpuProcess]:
    """A process with a graphics adapter."""
    process = GpuProcess()
    reason = process(gpu_work.no_adapter_reason)
    if reason:
        process.close()
        (pytest.fail if REQUIRED else pytest.skip)(reason)
    yield process
    process.close()

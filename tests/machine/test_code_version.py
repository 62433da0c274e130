"""The hash of this project's code: once per process, however many threads ask for it at the same time."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from qwen3_moe_jax.core import code_version as module


def test_threads_read_the_files_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read(path))
    module._of_files.cache_clear()
    together = Barrier(4)

    def ask(_: int) -> str:
        together.wait()
        return module.code_version()

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(ask, range(4)))
    assert len(found) == 1
    assert len(reads) == len(set(reads)) > 100

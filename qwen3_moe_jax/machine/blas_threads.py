"""How many threads NumPy's matrix products take: one each, where several run side by side.

OpenBLAS starts a thread a core for every product, and they spin while they wait.
Four products at a time on four cores are sixteen threads that take turns: the
reference's runs of a small model then cost five times their arithmetic.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_SETTER, _GETTER = "scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_"
"""OpenBLAS's functions under the names that NumPy's own builds give them."""


@contextmanager
def one_thread_a_product() -> Iterator[None]:
    """NumPy's products stay on the thread that asks; nothing changes where NumPy has another BLAS."""
    library = _openblas()
    if library is None:
        yield
        return
    before = getattr(library, _GETTER)()
    getattr(library, _SETTER)(1)
    try:
        yield
    finally:
        getattr(library, _SETTER)(before)


def threads_a_product() -> int | None:
    """Threads of one product, or None where NumPy has another BLAS."""
    library = _openblas()
    return library and getattr(library, _GETTER)()


def _openblas() -> ctypes.CDLL | None:
    """The OpenBLAS that NumPy's wheel brought and has loaded."""
    home = Path(np.__file__).parent
    for folder in (home.with_name("numpy.libs"), home / ".dylibs"):
        for path in folder.glob("*openblas*"):
            library = ctypes.CDLL(str(path))
            if hasattr(library, _SETTER) and hasattr(library, _GETTER):
                return library
    return None

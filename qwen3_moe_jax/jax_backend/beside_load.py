"""What a session is made of, found out while its weights go up to a GPU.

Kernels to import and the shapes of all programs take more than half a second of Python. A GPU's load is
reading and copying, with the interpreter's lock free, so the two run side by side there; a CPU's load keeps
the processors busy itself.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from qwen3_moe_jax.convert.progress import ProgressCallback, at_first

P = TypeVar("P")
R = TypeVar("R")


def load_beside(
    get_ready: Callable[[], R],
    begin: Callable[[R], object],
    load: Callable[[ProgressCallback | None], P],
    progress: ProgressCallback | None,
    *,
    undo: Callable[[], object],
    is_beside: bool,
) -> P:
    """Gets ready and loads; calls ``begin`` when both that and the first weights are there.

    A device takes in one program at a time, and those of the load go first.

    Args:
      get_ready: gives what ``begin`` takes.
      begin: called in whatever thread is last.
      load: gives the weights, and tells how far it is.
      progress: told so.
      undo: called where all was got ready and the load failed.
      is_beside: whether the two run at the same time.

    Raises:
      Exception: as ``load`` and ``get_ready``, that of the load first.
    """
    if not is_beside:
        ready = get_ready()
        try:
            return load(at_first(lambda: begin(ready), progress))
        except BaseException:
            undo()
            raise

    def if_found(done: Future[R]) -> None:
        if done.exception() is None:
            begin(done.result())

    with ThreadPoolExecutor(1, thread_name_prefix="ready") as pool:
        asked = pool.submit(get_ready)
        try:
            found = load(at_first(lambda: asked.add_done_callback(if_found), progress))
        except BaseException:
            if asked.exception() is None:
                undo()
            raise
        asked.result()
    return found

"""Processes for the work of ``verify`` that is NumPy alone: the file's check, the reference, the judge.

In the process that feeds a device such work would share the interpreter's lock with it: sixteen threads took
six times as long as four. One process without threads (``crew_worker``) forks as many as there are
processors, for one piece of work after the other.
"""

import os
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from qwen3_moe_jax.convert.gguf_source import GGUFSource
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.runner import Forward
from qwen3_moe_jax.machine.child_environment import child_environment
from qwen3_moe_jax.machine.folders import writable_cache
from qwen3_moe_jax.machine.threads import processors
from qwen3_moe_jax.parity.judge import Judgement

MIN_PROCESSORS = 5
"""With fewer, threads are as fast."""

MAX_PROCESSES = 32

SETTINGS = {
    **dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}
"""Each process has one thread, and keeps the memory of arrays that it makes again and again: otherwise the
system gives each array new pages, and a product of the judge took 5.8 ns per weight in place of 3.5."""

LENGTH = struct.Struct("<Q")


def send(file: Any, value: Any) -> None:
    """Writes one pickle with its length before it."""
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    file.write(LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def receive(file: Any) -> Any:
    """Reads one.

    Raises:
      EOFError: whoever writes is gone.
    """
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError("the other process has ended")
    (nbytes,) = LENGTH.unpack(head)
    data = file.read(nbytes)
    if len(data) < nbytes:
        raise EOFError("the other process has ended")
    return pickle.loads(data)


class Crew:
    """Asks the processes, one request after the other; several threads may ask.

    Attributes:
      count: how many processes share the work.
    """

    def __init__(self, source: ModelSource, count: int):
        """Starts them.

        Raises:
          OSError: they cannot be started.
        """
        self.count = count
        self._vocab = source.config.vocab_size
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwen3_moe_jax.parity.crew_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(**SETTINGS),
            start_new_session=True,
        )
        send(self._process.stdin, (str(source.path), count))

    @classmethod
    def of(cls, source: ModelSource) -> "Crew | None":
        """As many as there are processors; None where threads are as good, or processes cannot be had."""
        count = min(processors(), MAX_PROCESSES)
        if count < MIN_PROCESSORS or not hasattr(os, "fork") or not isinstance(source, GGUFSource):
            return None
        try:
            return cls(source, count)
        except OSError:
            return None

    def ask(self, name: str, **arguments: Any) -> Any:
        """What a function of ``crew_worker.TASKS`` returns.

        Raises:
          EOFError, OSError: the processes were ended.
          Exception: what the function raised.
        """
        with self._lock:
            send(self._process.stdin, (name, arguments))
            is_found, value = receive(self._process.stdout)
        if not is_found:
            raise value
        return value

    def check_file(self) -> tuple[int, int]:
        """As ``file_check.rows_that_differ``, of all tensors."""
        return self.ask("check_file")

    def forwards(
        self, texts: Sequence[np.ndarray], dtype: DTypeLike, capture: Collection[str] = ()
    ) -> tuple[np.ndarray, list[Forward]]:
        """As ``ReferenceRunner.forwards``; the logits of all texts lie in a file that has no name.

        Returns:
          Logits float32 [all tokens, V], and each text's part.
        """
        shape = (sum(map(len, texts)), self._vocab)
        with tempfile.TemporaryDirectory(dir=writable_cache("scratch")) as folder:
            path = Path(folder) / "logits"
            logits = np.memmap(path, np.float32, "w+", shape=shape)
            options = {"dtype": np.dtype(dtype).name, "capture": tuple(capture), "logits": str(path)}
            found = self.ask("run_texts", texts=list(texts), **options)
        ends = np.cumsum([len(text) for text in texts])
        rooms = [logits[end - len(text) : end] for end, text in zip(ends, texts, strict=True)]
        return logits, [Forward(room, *parts) for room, parts in zip(rooms, found, strict=True)]

    def judge(
        self,
        facts: Mapping[str, object],
        token_ids: np.ndarray,
        forward: Forward,
        layers: Sequence[int] = (),
    ) -> list[Judgement]:
        """As ``StageJudge.judgements``."""
        plain = {key: np.asarray(value) for key, value in forward.stages.items()}
        shown = Forward(forward.logits[:0], forward.expert_ids, plain)
        return self.ask("judge_stages", facts=dict(facts), token_ids=token_ids, forward=shown, layers=layers)

    def close(self) -> None:
        """Ends them."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout):
            if file is not None:
                with suppress(OSError):
                    file.close()

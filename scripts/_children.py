"""Stages of a measurement in processes of their own: what a child says, and the parent's side of it."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from qwen3_moe_jax.machine.child_environment import child_environment
from scripts import ROOT

_RESULT = "RESULT "


@contextmanager
def programs_in(folder: str | None) -> Generator[str]:
    """A folder for a child's programs, to be kept for another script; None is one that is deleted."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as found:
        yield found


def say(**result: object) -> None:
    """In a child: one result line for the parent."""
    sys.stdout.write(f"{_RESULT}{json.dumps(result)}\n")  # whole lines: several threads tell
    sys.stdout.flush()


def results_of(
    script: str, stage: str, options: Mapping[str, object], cache: str, seconds: float
) -> Generator[tuple[float, dict[str, Any]]]:
    """Runs ``python -m scripts.NAME --child STAGE OPTIONS`` and prints what it says.

    Args:
      script, stage: NAME, and what of it runs.
      options: for the child, as JSON.
      cache: the folder in which it keeps its programs.
      seconds: after these it is killed.

    Yields:
      Its results with the seconds at which they came; {"error": ...} at the end where it failed. The child
      ends when nobody asks for more.
    """
    environment = child_environment(XDG_CACHE_HOME=cache, CUDA_CACHE_PATH=f"{cache}/nv")
    command = [sys.executable, "-u", "-m", f"scripts.{script}", "--child", stage, json.dumps(options)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killer = threading.Timer(seconds, process.kill)
    killer.start()
    try:
        assert process.stdout
        for line in process.stdout:
            at = round(time.perf_counter() - began, 2)
            print(f"[{stage} {at:7.2f} s] {line.rstrip()}", flush=True)
            if line.startswith(_RESULT):
                yield at, json.loads(line.removeprefix(_RESULT))
        code = process.wait()
    finally:
        killer.cancel()
        if process.poll() is None:
            process.kill()
    if code:
        yield round(time.perf_counter() - began, 2), {"error": f"ended with code {code}"}

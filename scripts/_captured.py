"""What libraries write past Python, such as ptxas' report, as lines."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def captured_output() -> Iterator[list[str]]:
    """What libraries write to the process' standard output and error meanwhile, as lines."""
    lines: list[str] = []
    sys.stdout.flush()
    with tempfile.TemporaryFile("w+") as file:
        kept = [os.dup(n) for n in (1, 2)]
        for n in (1, 2):
            os.dup2(file.fileno(), n)
        try:
            yield lines
        finally:
            for n, fd in zip((1, 2), kept, strict=True):
                os.dup2(fd, n)
                os.close(fd)
            file.seek(0)
            lines += file.read().splitlines()

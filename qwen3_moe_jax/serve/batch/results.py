"""The file of results: each request's line once, whatever ends the program between two bytes.

A line is written in one piece with its line end, and is on the disk before its request counts as answered.
What a killed program left of its last line is cut off when the file is opened again.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from qwen3_moe_jax.core.errors import OutputFileError

Result = dict[str, Any]

HEAD = b'{"id": "batch_'
"""How each line begins: a last line without its end that begins otherwise is somebody's own text."""


class ResultsBusyError(RuntimeError):
    """Another process writes these results."""


def result(
    custom_id: str | None, *, response: Result | None = None, error: Result | None = None, identity: str = ""
) -> Result:
    """One line of OpenAI's format."""
    return {"id": f"batch_{identity}", "custom_id": custom_id, "response": response, "error": error}


def status_of(value: Result) -> str:
    """A result's kind in one word: "200", another status, or an error's code."""
    response, error = value.get("response"), value.get("error")
    return str(response["status_code"]) if response else str((error or {}).get("code"))


def _name(value: Any) -> str | int:
    """As ``Line.name``. Raises ValueError for what is no result."""
    try:
        found = value["error"]["line"] if value["custom_id"] is None else value["custom_id"]
        if not value["response"] and not value["error"]:  # a request has neither
            raise ValueError
        status_of(value)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError from error
    if not isinstance(found, str | int):
        raise ValueError
    return found


class ResultsFile(Protocol):
    """What results need of a file: its lines, and writes that are whole."""

    def __iter__(self) -> Iterator[bytes]: ...
    def write(self, data: bytes, /) -> int: ...
    def seek(self, offset: int, /) -> int: ...
    def truncate(self, size: int, /) -> int: ...
    def fileno(self) -> int: ...


class Results:
    """The open file.

    Attributes:
      path: of the file.
      names: of requests that have their line (``Line.name``).
      statuses: how many lines there are of each kind.
    """

    def __init__(self, path: Path, file: ResultsFile, *, is_regular: bool):
        self.path, self._file, self._is_regular = path, file, is_regular
        self.names: set[str | int] = set()
        self.statuses: Counter[str] = Counter()
        self._nbytes = 0
        self._lock = threading.Lock()
        if is_regular:
            self._recover()

    @property
    def errors(self) -> int:
        """Lines that are no answer."""
        return sum(self.statuses.values()) - self.statuses["200"]

    def _recover(self) -> None:
        self._file.seek(0)
        for number, data in enumerate(self._file, 1):
            if not data.endswith(b"\n"):
                if not (data.startswith(HEAD) or HEAD.startswith(data)):
                    raise self._no_result(number)
                break
            self._nbytes += len(data)
            self._note(self._parsed(number, data))
        self._file.truncate(self._nbytes)
        self._file.seek(self._nbytes)

    def _parsed(self, number: int, data: bytes) -> Result:
        try:
            value = json.loads(data)
            name = _name(value)
        except ValueError:
            raise self._no_result(number) from None
        if name in self.names:
            raise OutputFileError(f"{self.path}: line {number} is a second result of {name!r}")
        return value

    def _no_result(self, number: int) -> OutputFileError:
        return OutputFileError(
            f"{self.path}: line {number} is no result of a batch: name another file, or remove this one"
        )

    def _note(self, value: Result) -> None:
        self.names.add(_name(value))
        self.statuses[status_of(value)] += 1

    def write(self, values: Sequence[Result]) -> None:
        """Appends results; they are on the disk when this returns.

        Raises:
          OutputFileError: the file cannot be written; what it held is as it was.
        """
        data = b"".join(json.dumps(v, ensure_ascii=False).encode() + b"\n" for v in values)
        with self._lock:
            try:
                self._append(data)
            except OSError as error:
                with suppress(OSError):
                    self._file.truncate(self._nbytes)
                raise OutputFileError(f"{self.path} cannot be written: {error.strerror}") from error
            self._nbytes += len(data)
            for value in values:
                self._note(value)

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        if self._is_regular:
            os.fsync(self._file.fileno())


@contextmanager
def open_results(path: str | os.PathLike[str]) -> Iterator[Results]:
    """The results at a path, new or from an earlier run; nobody else may write them meanwhile.

    Raises:
      ResultsBusyError: another process writes them.
      OutputFileError: they cannot be written, or are no results.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # /dev/stdout, a pipe
        with _opened(path, "wb") as file:
            yield Results(path, file, is_regular=False)
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ResultsBusyError(f"another process writes {path}: wait for it to end") from None
    try:
        with _opened(path, "r+b" if path.exists() else "x+b") as file:
            yield Results(path, file, is_regular=True)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[ResultsFile]:
    try:
        file = path.open(mode, buffering=0)
    except OSError as error:
        raise OutputFileError(f"{path} cannot be written: {error.strerror}") from error
    with file:
        yield _Whole(file)


class _Whole:
    """An unbuffered file whose ``write`` writes all; a signal or a full pipe may cut the system's own."""

    def __init__(self, file: Any):
        self._file = file
        self.fileno: Callable[[], int] = file.fileno
        self.seek, self.truncate = file.seek, file.truncate

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        return len(data)

    def __iter__(self) -> Iterator[bytes]:
        with open(self.fileno(), "rb", closefd=False) as lines:
            yield from lines


def without_failures(path: str | os.PathLike[str]) -> int:
    """Takes the lines that are no answers out of the results, so that they are asked again; how many.

    Raises:
      OutputFileError: the file is no file of results.
    """
    from qwen3_moe_jax.core.output_file import open_output

    with open_results(path) as results:
        removed = results.errors
        if removed:
            lines = Path(path).read_bytes().splitlines(keepends=True)
            with open_output(path) as file:
                file.writelines(line for line in lines if status_of(json.loads(line)) == "200")
    return removed

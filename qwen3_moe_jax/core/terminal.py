"""The one module that writes to the terminal and reads from it.

Results go to standard output, everything else to standard error. Four promises
hold for each function:

- Any text can be written: a character that the stream's encoding lacks becomes "?".
- A line stays one line: control characters, line ends, bidirectional overrides and
  the like are escaped (``\\x1b``), so that a name in a file cannot forge a line or
  command the terminal. Text that the model writes keeps its line ends and tabs; a
  terminal gets its other control characters escaped, a pipe or a file gets each
  character as it is.
- A stream may be missing or closed. Standard input is then at its end, and what is
  written is dropped.
- A reader that goes away (``| head``) ends the program without a word
  (:class:`ReaderGone`). Standard error cannot stop the work: if it fails, notes are
  dropped.
"""

import json
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from qwen3_moe_jax.convert.errors import printable
from qwen3_moe_jax.convert.progress import ProgressCallback, format_bytes
from qwen3_moe_jax.core import input_file, speaker
from qwen3_moe_jax.core.errors import OutputFileError
from qwen3_moe_jax.core.input_file import decoded

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "qwen3-moe"

SLOW_SECONDS = 2.0
"""A wait longer than this is explained."""

QUIET_SECONDS = 1.0
"""Jobs shorter than this show no progress."""

LINE_SECONDS = 5.0
"""Time between two plain lines of progress."""

ESTIMATE_SHARE, ESTIMATE_SECONDS = 0.1, 3.0
"""The time left is told after this share of the work, or after so long: before, it is a guess."""

_LONGEST_LINE = 100_000

_LONGEST_NOTE, _LONGEST_WORD = 1500, 300  # a name in a file may have 5,000 characters

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What a terminal acts upon, but for line feed and tab: C0, C1, line separators, bidirectional controls."""


class ReaderGone(BaseException):
    """Nobody reads standard output any more. No ``except Exception`` on the way may hide it."""


# Streams


def guard_streams() -> None:
    """Opens the null device in place of standard streams that are closed.

    Otherwise the next file that is opened gets number 0, 1 or 2, and whatever a
    library writes to "standard error" goes into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _send(stream: TextIO | None, text: str) -> None:
    """Writes and flushes; a missing or closed stream, or a process that is silent, drops the text.

    Raises:
      OSError: the stream cannot be written.
    """
    if stream is None or getattr(stream, "closed", False) or speaker.is_silent():
        return
    stream.write(_encodable(text, getattr(stream, "encoding", None) or "utf-8"))
    stream.flush()


def _encodable(text: str, encoding: str) -> str:
    """``text`` with "?" for each character that ``encoding`` does not have."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "replace").decode(encoding)
    return text


def _discard(stream: TextIO | None) -> None:
    """Sends what the stream still holds to the null device, so that the end of the program is silent."""
    if stream is None:
        return
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _to_output(text: str) -> None:
    try:
        _send(sys.stdout, text)
    except BrokenPipeError:
        _discard(sys.stdout)
        raise ReaderGone from None
    except OSError as error:
        _discard(sys.stdout)
        raise OutputFileError(f"standard output cannot be written: {error.strerror}") from error


def _to_notes(text: str) -> None:
    try:
        _send(sys.stderr, text)
    except OSError:
        _discard(sys.stderr)


class _Notes:
    """Standard error as a file for ``rich``."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        _to_notes(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""

    def isatty(self) -> bool:
        return notes_on_terminal()


class _Output(_Notes):
    """Standard output as a file for ``rich``."""

    def write(self, text: str) -> int:
        _to_output(text)
        return len(text)

    def isatty(self) -> bool:
        return output_on_terminal()


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def output_on_terminal() -> bool:
    """Whether standard output is a terminal."""
    return _is_terminal(sys.stdout)


def notes_on_terminal() -> bool:
    """Whether standard error is a terminal."""
    return _is_terminal(sys.stderr)


def input_on_terminal() -> bool:
    """Whether standard input is a terminal."""
    return _is_terminal(sys.stdin)


def one_line(text: object) -> str:
    """``text`` as one line without control characters."""
    return printable(str(text), _LONGEST_LINE)


def in_short(text: object) -> str:
    """As :func:`one_line`, with long words (names out of a file) and long lines cut in their middle."""
    cut = re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda word: printable(word[0], _LONGEST_WORD), str(text))
    return printable(cut, _LONGEST_NOTE)


# Writing


def show(*lines: object) -> None:
    """Writes results, each as one line."""
    _to_output("".join(f"{one_line(line)}\n" for line in lines))


def show_styled(*parts: tuple[object, str | None], notes: bool = False) -> None:
    """Writes one line of parts, each with a style of ``rich``; styles are for terminals only."""
    is_terminal, send = (notes_on_terminal(), _to_notes) if notes else (output_on_terminal(), _to_output)
    pieces = [(one_line(text), style) for text, style in parts]
    if not is_terminal:
        send("".join(text for text, _ in pieces) + "\n")
        return
    from rich.text import Text

    console = styled(notes=notes, soft_wrap=True)
    with console.capture() as capture:
        console.print(Text.assemble(*[(text, style or "") for text, style in pieces]))
    send(capture.get())


def styled(*, notes: bool = False, **options: Any) -> "Console":
    """A console of ``rich`` on standard output, or on standard error; its text must be ``harmless``."""
    from rich.console import Console

    return Console(file=cast("IO[str]", _Notes() if notes else _Output()), highlight=False, **options)


def can_style() -> bool:
    """Whether standard output is a terminal that moves its cursor and has the characters of frames."""
    encoding = getattr(sys.stdout, "encoding", None) or ""
    is_dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return output_on_terminal() and not is_dumb and encoding.lower().startswith("utf")


def harmless(text: str) -> str:
    """The text with what a terminal acts upon escaped; line ends and tabs stay."""
    return _CONTROLS.sub(lambda found: ascii(found.group())[1:-1], text)


def control(sequence: str) -> None:
    """Sends our own control sequence to the terminal; nothing elsewhere."""
    if output_on_terminal():
        _to_output(sequence)


def show_json(value: Any, *, indent: int | None = None) -> None:
    """Writes one JSON value; JSON escapes what is not ASCII."""
    _to_output(json.dumps(value, indent=indent, default=str) + "\n")


def show_text(text: str) -> None:
    """Writes text of the model or of a help page: as it is, but for control characters on a terminal."""
    _to_output(harmless(text) if output_on_terminal() else text)


def note(*lines: object) -> None:
    """Writes lines to standard error, each of them in short."""
    _to_notes("".join(f"{in_short(line)}\n" for line in lines))


def error(line: object) -> None:
    """Writes one line to standard error, with the program's name."""
    with speaker.aloud():
        note(f"{PROGRAM}: {line}")


class Status:
    """One line on standard error that is written over on a terminal, and written again elsewhere."""

    def __init__(self):
        self._is_shown = False

    def show(self, line: str) -> None:
        """Replaces the line."""
        if notes_on_terminal():
            _to_notes(f"\r\x1b[K{in_short(line)}")
            self._is_shown = True
        else:
            note(line)

    def clear(self) -> None:
        """Takes the line away."""
        if self._is_shown:
            _to_notes("\r\x1b[K")
        self._is_shown = False


@contextmanager
def explain_if_slow(
    text: str | Callable[[], str], *, quiet: bool = False, seconds: float | None = None
) -> Generator[Callable[[], None], None, None]:
    """Says ``text`` on standard error if the block, or what precedes a call of its value, takes long."""
    seconds = SLOW_SECONDS if seconds is None else seconds
    timer = threading.Timer(seconds, lambda: note(text() if callable(text) else text))
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield timer.cancel
    finally:
        timer.cancel()


# Progress


class Estimate:
    """Rate and time left of a job; the clock starts with the first report, not before."""

    def __init__(self):
        self._began: float | None = None
        self._done_before = 0

    def __call__(self, done: int, total: int) -> tuple[float, float | None, float | None]:
        """Seconds since the first report, bytes per second, and seconds left; None for what is not known."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._done_before = now, done
        seconds = now - self._began
        rate = (done - self._done_before) / seconds if seconds > 0 else 0.0
        is_known = rate > 0 and (done >= ESTIMATE_SHARE * total or seconds >= ESTIMATE_SECONDS)
        return seconds, rate or None, (total - done) / rate if is_known else None


@contextmanager
def show_progress(label: str, *, quiet: bool = False) -> Generator[ProgressCallback, None, None]:
    """Shows how far one job is, on standard error: a bar on a terminal, else lines; nothing if ``quiet``."""
    if quiet:
        yield lambda done, total: None
        return
    reporter = _bar if notes_on_terminal() else _lines
    with reporter(in_short(label)) as callback:
        yield callback


@contextmanager
def _lines(label: str) -> Generator[ProgressCallback, None, None]:
    estimate = Estimate()
    due = QUIET_SECONDS

    def report(done: int, total: int) -> None:
        nonlocal due
        seconds, rate, left = estimate(done, total)
        if seconds < due or done >= total:
            return
        due = seconds + LINE_SECONDS
        note(f"{label}: {format_bytes(done)} of {format_bytes(total)}{rate_text(rate, left)}")

    yield report


@contextmanager
def _bar(label: str) -> Generator[ProgressCallback, None, None]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[speed]}", markup=False),
    )
    estimate = Estimate()
    console = styled(notes=True)
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,  # this module writes to the real streams
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task(label, total=None, visible=False, speed="")

        def report(done: int, total: int) -> None:
            seconds, rate, left = estimate(done, total)
            is_visible = seconds >= QUIET_SECONDS
            bar.update(task, completed=done, total=total, visible=is_visible, speed=rate_text(rate, left))
            bar.refresh()

        yield report


def rate_text(rate: float | None, left: float | None) -> str:
    """Rate and time left, after a comma; nothing of what is not known."""
    text = "" if rate is None else f", {format_bytes(rate)}/s"
    return text if left is None else f"{text}, {left:.0f} s left"


# Reading


def read_text(path: str) -> str:
    """The text of a file, or of standard input for "-"; line ends stay as they are.

    Raises:
      ValueError: it is not UTF-8.
      OSError: it cannot be read, or is neither "-" nor a regular file.
    """
    if path != "-":
        return input_file.read_text(path, advice="- reads standard input")
    return decoded(_read_input(), "standard input")


def read_line() -> str | None:
    """The next line of standard input without its line end; None at the end of input.

    Raises:
      ValueError: the line is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        return None
    data = bytes_of_input().readline()
    line = decoded(data, "standard input") if isinstance(data, bytes) else data
    return line.rstrip("\r\n") if line else None


ASK_SECONDS = 0.2
"""An interrupt at the prompt is seen this soon."""


def ask(prompt: str) -> str | None:
    """A line from the person at the terminal; None at the end of input.

    An interrupt that comes between the prompt and the wait for a key would be seen at the next key alone, so
    the wait is in short pieces.
    """
    try:
        if os.name == "nt" or sys.stdin is None or not sys.stdin.isatty():
            return input(prompt)
        sys.stdout.write(prompt)
        sys.stdout.flush()
        while not select.select([sys.stdin], [], [], ASK_SECONDS)[0]:
            pass
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    except (EOFError, RuntimeError):  # RuntimeError: a stream was lost
        return None


def input_name(path: str) -> str:
    """How a message calls a file whose name may be "-"."""
    return "standard input" if path == "-" else path


def bytes_of_input() -> Any:
    """Standard input as a stream of bytes."""
    return getattr(sys.stdin, "buffer", sys.stdin)


def _read_input() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        return b""
    try:
        data = bytes_of_input().read()
    except OSError as error:
        raise OSError(f"standard input cannot be read: {error.strerror}") from error
    return data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape")

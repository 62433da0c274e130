"""The line of input at a terminal: editing, history, completion, several lines in one message.

Built on prompt_toolkit, which reads keys one by one. Where the terminal cannot move its cursor
(``TERM=dumb``), or output goes elsewhere, a plain line is read.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwen3_moe_jax.core import interrupts, terminal

PROMPT, CONTINUED = "> ", ". "

QUOTES = '"""'
"""A message that begins with these ends with them: Enter begins a new line until then."""

Complete = Callable[[str], Iterable[tuple[str, int]]]
"""The words that may stand at the end of a text, each with how many characters it replaces."""


def unquoted(text: str) -> str:
    """A message without the three quotes around it."""
    bare = text.strip()
    is_quoted = bare.startswith(QUOTES) and bare.endswith(QUOTES) and len(bare) >= 2 * len(QUOTES)
    return bare[len(QUOTES) : -len(QUOTES)].strip("\n") if is_quoted else text


def make_editor(complete: Complete, history: Path | None) -> Callable[[], str | None]:
    """A function that asks for one message; it gives None at the end, and raises KeyboardInterrupt.

    Args:
      complete: of commands.
      history: the file that keeps messages between runs; None keeps none.
    """
    if not (terminal.input_on_terminal() and terminal.can_style()):
        return lambda: terminal.ask(PROMPT)
    session = _session(complete, history)

    def ask() -> str | None:
        leave = _Leave(session.app)
        try:
            with interrupts.at_the_end_of(leave.soon):
                return unquoted(session.prompt(PROMPT, handle_sigint=False, pre_run=leave.when_running))
        except EOFError:
            return None

    return ask


class _Leave:
    """Ends the editor at a signal, which may come before its event loop runs and while that ends."""

    def __init__(self, app):
        self.app = app
        self.is_wanted = False
        self.loop: asyncio.AbstractEventLoop | None = None

    def soon(self) -> None:
        self.is_wanted = True
        if self.loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._now)

    def when_running(self) -> None:
        self.loop = asyncio.get_running_loop()
        if self.is_wanted:
            self.loop.call_soon(self._now)

    def _now(self) -> None:
        if self.app.is_running and not self.app.is_done:
            self.app.exit(result="")


def _session(complete: Complete, history: Path | None):
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.filters import Condition

    class Words(Completer):
        def get_completions(self, document, complete_event):
            for word, replaced in complete(document.text_before_cursor):
                yield Completion(word, -replaced)

    session = PromptSession(
        history=_history(history),
        completer=Words(),
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
        reserve_space_for_menu=4,
        multiline=True,
        prompt_continuation=CONTINUED,
        key_bindings=_keys(),
        enable_open_in_editor=True,
    )
    return session


def _keys():
    """Enter sends, Alt-Enter begins a new line; pasted lines stay in one message."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event):
        buffer = event.current_buffer
        text = buffer.text.strip()
        if text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES)):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event):
        event.current_buffer.newline(copy_margin=False)

    return keys


def _history(path: Path | None):
    """Messages of this run and, where their file can be used, of earlier ones."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Kept(FileHistory):
        def load_history_strings(self):
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

        def store_string(self, string):
            with suppress(OSError):
                super().store_string(string)

    if path is None or not _is_ready(path):
        return InMemoryHistory()
    return Kept(str(path))


def _is_ready(path: Path) -> bool:
    """Makes the file, for its owner alone; False where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return False
    return True


@contextmanager
def keys_unseen() -> Iterator[None]:
    """Keys that are pressed within the block do not show; the next prompt gets them."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    try:
        before = termios.tcgetattr(0)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(0, termios.TCSANOW, silent)
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, before)

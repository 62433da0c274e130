"""Commands in processes of their own: with pipes, or at a pseudo-terminal that a test types at."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

SECONDS = 120

# A suite that runs in the background of a shell has SIGINT ignored, and children inherit that.
START = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from qwen3_moe_jax.cli import main; sys.exit(main(sys.argv[1:]))"
)


def start(*args: str, code: str = START, **options) -> subprocess.Popen:
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    command = [sys.executable, "-u", "-c", code, *args]
    return subprocess.Popen(command, **{**pipes, "text": True, **options})


class Terminal:
    """A command at a terminal of its own, driven by keys.

    Attributes:
      shown: what was not matched yet.
      all: every byte that came.
    """

    def __init__(self, *args: str, size: tuple[int, int] = (24, 80), first: str = "", **environment: str):
        """``size``: lines and columns. ``first``: Python statements that run before the command."""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        streams = {name: slave for name in ("stdin", "stdout", "stderr")}
        code = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {first}\n{START}"
        environment = {**os.environ, "TERM": "dumb", **environment}
        self.process = start(*args, code=code, start_new_session=True, env=environment, **streams)
        os.close(slave)
        self.shown, self.all = "", b""

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, pattern: str) -> str:
        """What is shown up to and with a match; what comes later is left."""
        while not (found := re.search(pattern, self.shown)):
            self.shown += self._read()
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def _read(self) -> str:
        data = os.read(self.master, 4096)
        self.all += data
        text = data.decode(errors="replace")
        print(text, end="")  # for a failure's report
        return text

    def exit_code(self) -> int:
        try:
            while data := os.read(self.master, 4096):
                self.all += data
        except OSError:  # Linux: the other side is closed
            pass
        return self.process.wait(timeout=SECONDS)

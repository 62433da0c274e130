"""What the exit status of a command means: one table for the commands, ``--help`` and the documents."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The status with which ``qwen3-moe`` ends."""

    DONE = 0
    FAULT = 1
    USAGE = 2
    MEMORY = 3
    BUSY = 4
    NOT_EMPTY = 5
    OUTPUT = 6
    HUB = 7
    HUNG_UP = 129
    INTERRUPTED = 130
    READER_GONE = 141
    TERMINATED = 143


MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FAULT: "a fault, or a verdict that is not a pass",
    ExitCode.USAGE: "a wrong command line or environment variable: nothing was loaded",
    ExitCode.MEMORY: "the memory does not suffice",
    ExitCode.BUSY: "another process writes the output",
    ExitCode.NOT_EMPTY: "convert: something is at the output's name already",
    ExitCode.OUTPUT: "an output cannot be written",
    ExitCode.HUB: "the model hub cannot be reached, or refuses",
    ExitCode.HUNG_UP: "ended by SIGHUP: its terminal was closed",
    ExitCode.INTERRUPTED: "interrupted with Ctrl-C",
    ExitCode.READER_GONE: "the reader of standard output went away (| head)",
    ExitCode.TERMINATED: "ended by SIGTERM",
}


def table() -> str:
    """The codes and their meanings, one line for each."""
    return "\n".join(f"  {code.value:>3}  {meaning}" for code, meaning in MEANINGS.items())

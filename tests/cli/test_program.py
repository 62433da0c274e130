"""The console's entry: what a process that ends waits for."""

import sys
from types import SimpleNamespace

import pytest

from qwen3_moe_jax import cli
from qwen3_moe_jax.core.exit_codes import ExitCode


class Left(BaseException):
    """In place of the end of the process."""


@pytest.mark.parametrize(
    ("code", "seconds"),
    [(ExitCode.DONE, cli.SECONDS_TO_KEEP), (ExitCode.USAGE, cli.SECONDS_TO_KEEP)]
    + [(code, 0.0) for code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED, ExitCode.READER_GONE)],
)
@pytest.mark.parametrize("is_made_in_time", [True, False])
def test_a_program_that_is_nearly_compiled_is_waited_for(code, seconds, is_made_in_time, monkeypatch):
    """Else no command that ends sooner than its compiler would ever find the program."""
    compiling, waited = [True], []

    def finish(for_seconds):
        waited.append(for_seconds)
        compiling[0] = not is_made_in_time

    def leave(code):
        raise Left(code)

    preparation = SimpleNamespace(is_compiling=lambda: compiling[0], finish=finish)
    monkeypatch.setitem(sys.modules, "qwen3_moe_jax.jax_backend.preparation", preparation)
    monkeypatch.setattr(cli, "main", lambda: code)
    monkeypatch.setattr(cli.os, "_exit", leave)
    with pytest.raises(SystemExit if is_made_in_time else Left) as end:
        cli.program()
    assert waited == [seconds]
    assert end.value.args == (code,)


def test_ctrl_c_while_it_waits_ends_it(monkeypatch):
    def finish(_seconds):
        raise KeyboardInterrupt

    def leave(code):
        raise Left(code)

    preparation = SimpleNamespace(is_compiling=lambda: True, finish=finish)
    monkeypatch.setitem(sys.modules, "qwen3_moe_jax.jax_backend.preparation", preparation)
    monkeypatch.setattr(cli, "main", lambda: ExitCode.DONE)
    monkeypatch.setattr(cli.os, "_exit", leave)
    with pytest.raises(Left):
        cli.program()

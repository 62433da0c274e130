"""What a person is told of a fault: one line, and the exit code of a command that it ends."""

from qwen3_moe_jax.core.errors import (
    HubError,
    MemoryPlanError,
    OptionError,
    OutputFileError,
    for_command_line,
)
from qwen3_moe_jax.core.exit_codes import ExitCode


def explain(error: Exception) -> tuple[str | None, int]:
    """One line for a fault that a user can do something about, and its exit code; None for a bug of ours."""
    text = for_command_line(" ".join(str(error).split()))
    if isinstance(error, MemoryPlanError):
        return text, ExitCode.MEMORY
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        what = f"out of memory: {text[:300]}" if text else "out of memory"
        return f"{what}; a smaller --context or another machine may do", ExitCode.MEMORY
    if "can't start new thread" in text:
        advice = "raise the limit (ulimit -v, ulimit -u, or the container's number of processes)"
        return f"the system gives this process no more threads: {advice}", ExitCode.MEMORY
    if "Disallowed" in text and "transfer" in text:
        what = "arrays go between the host and the device while a model runs"
        advice = f"unset JAX_TRANSFER_GUARD and those for one direction ({text[:120]})"
        return f"JAX is told to forbid transfers, but {what}: {advice}", ExitCode.USAGE
    if isinstance(error, HubError):
        return text, ExitCode.HUB
    if isinstance(error, OptionError):
        return text, ExitCode.USAGE
    if isinstance(error, OutputFileError):
        return text, ExitCode.OUTPUT
    if isinstance(error, ValueError | OSError | RuntimeError | ArithmeticError | NotImplementedError):
        return text or type(error).__name__, ExitCode.FAULT
    return None, ExitCode.FAULT

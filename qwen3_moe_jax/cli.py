"""``qwen3-moe``: the command line.

A command is a module with ``add_arguments`` and ``run``, imported only when it
is called, so that ``--help`` is quick. Every fault that a user can cause ends
in one line on standard error and an exit code: 1 for a fault, 2 for a wrong
command line, 3 when memory does not suffice, 130 for Ctrl-C.
"""

import argparse
import importlib
import os
import sys

from qwen3_moe_jax.core.errors import MemoryPlanError, for_command_line

PROGRAM = "qwen3-moe"

COMMANDS = {
    "generate": ("qwen3_moe_jax.commands.generate", "write text after a prompt"),
    "chat": ("qwen3_moe_jax.commands.chat", "talk with the model in the terminal"),
    "perplexity": ("qwen3_moe_jax.commands.perplexity", "measure how well the model expects a text"),
    "bench": ("qwen3_moe_jax.commands.bench", "measure how fast the model is on this machine"),
    "convert": ("qwen3_moe_jax.commands.convert", "pack a GGUF file into a checkpoint folder"),
    "inspect": ("qwen3_moe_jax.commands.inspect", "show what a model file holds and what will run"),
    "verify": ("qwen3_moe_jax.commands.verify", "prove on this machine that a backend is right"),
    "trace": ("qwen3_moe_jax.commands.trace", "show every stage of every layer for a prompt"),
    "bisect": ("qwen3_moe_jax.commands.bisect", "name the first stage where two backends part"),
    "experts": ("qwen3_moe_jax.commands.experts", "draw which experts a text uses"),
    "doctor": (
        "qwen3_moe_jax.commands.doctor",
        "say what this machine can run, and what to do about the rest",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader went away: `qwen3-moe inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    args = _parser(argv).parse_args(argv)
    if args.command is None:
        _parser([]).print_help()
        return 2
    try:
        return args.run(args)
    except Exception as error:
        if os.environ.get("QWEN3_MOE_DEBUG"):
            raise
        line, code = _explain(error)
        if line is None:
            raise
        print(f"{PROGRAM}: {line}", file=sys.stderr)
        return code


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Qwen3-MoE models straight from GGUF files.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        if name in argv[:1]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _explain(error: Exception) -> tuple[str | None, int]:
    """One line for a fault that a user can do something about, and its exit code; None for a bug of ours."""
    text = for_command_line(" ".join(str(error).split()))
    if isinstance(error, MemoryPlanError):
        return text, 3
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return f"out of memory: {text[:300]}; a smaller --context or another machine may do", 3
    if isinstance(error, ValueError | OSError | RuntimeError | ArithmeticError | NotImplementedError):
        return text or type(error).__name__, 1
    return None, 1


if __name__ == "__main__":
    sys.exit(main())

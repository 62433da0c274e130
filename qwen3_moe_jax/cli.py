# PYTHON_ARGCOMPLETE_OK
"""``qwen3-moe``: the command line.

A command is a module with ``add_arguments`` and ``run``, imported only when it
is called, so that ``--help`` is quick. Each fault that a user can cause ends in
one line on standard error and an exit code of ``core.exit_codes``.
"""

import argparse
import importlib
import os
import sys
from contextlib import suppress

from qwen3_moe_jax.commands.parser import Parser, guess_for_command
from qwen3_moe_jax.core import interrupts, terminal
from qwen3_moe_jax.core.exit_codes import ExitCode, table
from qwen3_moe_jax.core.explain import explain
from qwen3_moe_jax.core.terminal import PROGRAM

COMMANDS = {
    "generate": ("qwen3_moe_jax.commands.generate", "write text after a prompt"),
    "chat": ("qwen3_moe_jax.commands.chat", "talk with the model in the terminal"),
    "batch": ("qwen3_moe_jax.commands.batch", "answer a file of requests in OpenAI's batch format"),
    "serve": ("qwen3_moe_jax.commands.serve", "serve the model over HTTP, with a chat page"),
    "perplexity": ("qwen3_moe_jax.commands.perplexity", "measure how well the model expects a text"),
    "warm": ("qwen3_moe_jax.commands.warm", "compile a model's programs before its first use"),
    "bench": ("qwen3_moe_jax.commands.bench", "measure how fast the model is on this machine"),
    "convert": ("qwen3_moe_jax.commands.convert", "pack a GGUF file into a checkpoint folder"),
    "pull": ("qwen3_moe_jax.commands.pull", "download a model from Hugging Face"),
    "models": ("qwen3_moe_jax.commands.models", "list the models on this machine, and which run here"),
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

SECONDS_TO_KEEP = 2.0
"""What a process that ends waits for a program, at most: those of a CPU take a second."""

LOOKS = ("doctor", "inspect", "models", "pull")
"""Commands that compute nothing: they run with an environment in which nothing would."""

EPILOG = f"""\
exit codes:
{table()}

QWEN3_MOE_DEBUG=1 shows the traceback of a fault.
Completion in bash and zsh: eval "$(register-python-argcomplete {PROGRAM})"
"""


def program() -> None:
    """The console's entry: runs a command and ends the process, also while a program is being compiled.

    A compilation in the background cannot be interrupted. One that is nearly done is waited for, so that the
    next process finds its program; nobody waits who has asked for the end.
    """
    code = main()
    processes = sys.modules.get("qwen3_moe_jax.machine.processes")
    if processes is not None and processes.joined():
        processes.end(code)
    preparation = sys.modules.get("qwen3_moe_jax.jax_backend.preparation")
    if preparation is not None and preparation.is_compiling():
        with suppress(KeyboardInterrupt):
            preparation.finish(SECONDS_TO_KEEP if code < 128 else 0.0)
        if preparation.is_compiling():
            os._exit(code)
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    terminal.guard_streams()
    try:
        with interrupts.handled():
            return _run(argv)
    except SystemExit as end:  # argparse: --help, or a wrong command line
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    except KeyboardInterrupt:
        terminal.error("interrupted")
        return ExitCode.INTERRUPTED
    except terminal.ReaderGone:
        return ExitCode.READER_GONE


def _run(argv: list[str]) -> int:
    try:
        args = _parse(argv)
        if args.command in COMMANDS and args.command not in LOOKS:
            _check_environment()
        if not getattr(args, "joins", False):
            return args.run(args)
        from qwen3_moe_jax.commands.common import beside_others  # --help needs none of it

        with beside_others(args) as agreed:
            return agreed(args.run(args))
    except Exception as error:
        if os.environ.get("QWEN3_MOE_DEBUG"):
            raise
        line, code = explain(error)
        if line is None:
            raise
        terminal.error(line)
        return code


def _check_environment() -> None:
    from qwen3_moe_jax.machine.environment import check_environment  # --help needs none of it

    check_environment()


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with the function that runs the command as ``run``."""
    parser, commands = _parser(argv[:1])
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    word = argv[0] if argv else ""
    if word and not word.startswith("-") and word not in COMMANDS:
        guess = guess_for_command(word, COMMANDS)
        parser.error(f"there is no command {word!r}{guess or ': ' + ', '.join(COMMANDS)}")
    args, extras = parser.parse_known_args(argv)
    if extras:
        commands.get(args.command, parser).refuse_extras(extras)
    if args.command is None:
        args.run = lambda _: _show_help(parser)
    return args


def _show_help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return ExitCode.USAGE


def _complete() -> None:
    """Answers the shell, which asks for the words that may follow, and ends."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    argcomplete.autocomplete(_parser(words[1:2])[0])


def _parser(words: list[str]) -> tuple[Parser, dict[str, Parser]]:
    """The whole grammar; only the command that is named has its arguments."""
    parser = Parser(
        prog=PROGRAM,
        description="Qwen3-MoE models straight from GGUF files.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    actions = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    commands = {}
    for name, (module_name, summary) in COMMANDS.items():
        text = summary[0].upper() + summary[1:] + "."
        commands[name] = command = actions.add_parser(name, help=summary, description=text)
        if name in words:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser, commands


def _version() -> str:
    from qwen3_moe_jax import __version__

    return __version__


if __name__ == "__main__":
    program()

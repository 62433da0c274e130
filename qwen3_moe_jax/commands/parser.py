"""The command line's grammar: ``argparse`` with short usage, guesses for misspelt words, our own output."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import IO, NoReturn

from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.exit_codes import ExitCode

SYNONYMS = {
    "run": "chat",
    "talk": "chat",
    "complete": "generate",
    "ppl": "perplexity",
    "benchmark": "bench",
    "info": "inspect",
    "show": "inspect",
    "check": "verify",
    "list": "models",
    "ls": "models",
    "download": "pull",
    "server": "serve",
    "help": "--help",
    "version": "--version",
}

NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$|-inf(inity)?$|-nan$", re.IGNORECASE)
"""A negative number, which is a value: argparse itself takes -1e-1 for an option."""
"""What other programs call our commands."""


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations; its faults are short and name what was meant."""

    def __init__(self, **options):
        super().__init__(**options, allow_abbrev=False)
        self._negative_number_matcher = NUMBER

    def error(self, message: str) -> NoReturn:
        """Ends with one line; the usage stands above it unless an argument's value is the fault."""
        if not message.startswith("argument ") or "expected" in message:
            terminal.note(*self.short_usage())
        terminal.error(_in_words(message))
        self.exit(ExitCode.USAGE)

    def short_usage(self) -> list[str]:
        """The positional arguments, and where the options are."""
        names = [self._get_formatter()._format_args(a, a.dest) for a in self._get_positional_actions()]
        return [
            " ".join(("usage:", self.prog, "[OPTIONS]", *names)),
            f"       {self.prog} --help explains each option",
        ]

    def refuse_extras(self, extras: list[str]) -> NoReturn:
        """Ends for arguments that nothing takes, with a guess for a misspelt option."""
        word = extras[0].partition("=")[0]
        guess = guess_for(word, self._option_string_actions) if word.startswith("-") else ""
        self.error(f"unrecognized arguments: {' '.join(extras)}{guess}")

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:
        if message:
            terminal.show_text(message)


def _in_words(message: str) -> str:
    """ "argument -k/--top-k: must be ..." as "--top-k must be ...", by the argument's first long name."""
    found = re.match(r"argument ([^:]+): (invalid)?", message)
    if found is None:
        return message
    name = next((name for name in found[1].split("/") if name.startswith("--")), found[1])
    if message.endswith("expected one argument"):
        message += f"; one that begins with - is given as {name}=-..."
    return f"{name}: {message[found.start(2) :]}" if found[2] else f"{name} {message[found.end() :]}"


def guess_for(word: str, known: Iterable[str]) -> str:
    """``"; did you mean --temperature?"``, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def guess_for_command(word: str, known: Iterable[str]) -> str:
    """As :func:`guess_for`, with the names that other programs use."""
    synonym = SYNONYMS.get(word.lower())
    return f"; did you mean {synonym}?" if synonym else guess_for(word.lower(), known)

"""A chat's settings in its file: ``/save`` writes them, ``/load`` and ``--load`` take them up.

Values have the names of the command's options. An option of the command line is stronger than a file.
"""

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from qwen3_moe_jax.commands import options
from qwen3_moe_jax.commands.common import SAMPLING_FIELDS
from qwen3_moe_jax.commands.generate import THINKING
from qwen3_moe_jax.commands.talk.conversation import Conversation
from qwen3_moe_jax.core import terminal

VIEWS = ("show", "fold", "hide")
"""What is shown of a model's thinking."""

NAMES = (*SAMPLING_FIELDS, "max_tokens", "stop", "thinking", "reasoning", "verbose", "chat_template")
"""Settings of a file, which are options of the command, too."""


def given_options(args: argparse.Namespace) -> frozenset[str]:
    """Those that the command line has, before a file's are put among them."""
    names = (*NAMES, "system")
    return frozenset(name for name in names if getattr(args, name) not in (None, [], False))


def load(path: Path) -> tuple[Conversation, dict[str, Any]]:
    """A conversation, and the settings that were saved with it, as an argument parser gives them.

    Raises:
      ValueError: it is no conversation, or has a value that the option would refuse.
      OSError: it cannot be read.
    """
    conversation, settings = Conversation.load(path)
    found: dict[str, Any] = {} if conversation.system is None else {"system": conversation.system}
    for name in NAMES:
        if name in settings:
            try:
                found[name] = CHECKS[name](settings[name])
            except (argparse.ArgumentTypeError, ValueError) as error:
                raise ValueError(f"{path}: setting {name}: {error}") from error
    if unknown := sorted(settings.keys() - set(NAMES)):
        terminal.note(f"note: settings that there are not are left out: {', '.join(unknown)[:200]}")
    return conversation, found


def apart(found: Mapping[str, Any], now: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """A file's settings without those of the command line; a line tells where these differ."""
    kept = [name for name in found if name in given and found[name] != now[name]]
    if kept:
        names = {"chat_template": "--chat-template-file"}
        said = ", ".join(names.get(name, f"--{name.replace('_', '-')}") for name in kept)
        terminal.note(f"note: of the command line, not of the file: {said}")
    return {name: value for name, value in found.items() if name not in given}


def _sampling(name: str) -> Callable[[object], Any]:
    parse = options.seed if name == "seed" else options.sampling_value(name)

    def check(value: object) -> Any:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{str(value)[:80]!r} is not a number")
        return parse(repr(value))

    return check


def _max_tokens(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{str(value)[:80]!r} is not a whole number")
    return options.number(1)(str(value))


def _stop(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("it must be a list of texts")
    return [options.text(text) for text in value]


def _thinking(value: object) -> str:
    for word, meaning in THINKING.items():
        if meaning is value:
            return word
    raise ValueError(f"{str(value)[:80]!r} is none of true, false, null")


def _one_of(*values: object) -> Callable[[object], Any]:
    def check(value: object) -> Any:
        for one in values:
            if type(one) is type(value) and one == value:
                return value
        raise ValueError(f"{str(value)[:80]!r} is none of {', '.join(map(str, values))}")

    return check


def _template(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError("it must be a template's text, or null for the model file's own")
    return value


CHECKS: dict[str, Callable[[object], Any]] = {
    **{name: _sampling(name) for name in SAMPLING_FIELDS},
    "max_tokens": _max_tokens,
    "stop": _stop,
    "thinking": _thinking,
    "reasoning": _one_of(*VIEWS),
    "verbose": _one_of(True, False),
    "chat_template": _template,
}

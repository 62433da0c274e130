"""Types of option values: each refuses what cannot be when the command line is read, before any load."""

import argparse
import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from qwen3_moe_jax.core.errors import OutputFileError
from qwen3_moe_jax.core.input_file import read_text
from qwen3_moe_jax.core.mesh import AUTO_MESH, mesh_sizes
from qwen3_moe_jax.core.output_file import check_output
from qwen3_moe_jax.core.sampling import SEEDS, Sampling, random_seed

MAXIMUM = 2**31 - 1
"""The largest count that is taken: a larger one overflows the index type of the arrays."""


def number(minimum: int, maximum: int = MAXIMUM) -> Callable[[str], int]:
    """Whole numbers from ``minimum`` to ``maximum``."""

    def parse(text: str) -> int:
        value = _parsed(int, text, "a whole number")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value}: it must be at least {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{value}: it must be at most {maximum}")
        return value

    return parse


def amount(minimum: float, maximum: float) -> Callable[[str], float]:
    """Numbers from ``minimum`` to ``maximum``; a ``nan`` is none of them."""

    def parse(text: str) -> float:
        value = _parsed(float, text, "a number")
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text}: it must be from {minimum:g} to {maximum:g}")
        return value

    return parse


def seconds(text: str) -> float:
    """A time above 0."""
    value = _parsed(float, text, "a number")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: it must be above 0")
    return value


def sampling_value(name: str) -> Callable[[str], float | int]:
    """Values of a field of ``Sampling``, in its own range."""
    kind: Any = next(field.type for field in fields(Sampling) if field.name == name)

    def parse(text: str) -> float | int:
        value = _parsed(kind, text, "a whole number" if kind is int else "a number")
        try:
            Sampling(**{name: value})
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name} ")) from error
        return value

    return parse


def seed(text: str) -> int:
    """A seed; -1 and "random" draw one."""
    if text in ("-1", "random"):
        return random_seed()
    value = _parsed(int, text, "a whole number")
    if not 0 <= value < SEEDS:
        raise argparse.ArgumentTypeError(f"{value}: it must be from 0 to {SEEDS - 1}, or -1 for a random one")
    return value


def text(value: str) -> str:
    """A text of at least one character, in UTF-8."""
    if not value:
        raise argparse.ArgumentTypeError("is empty: give at least one character")
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes of the command line that the locale's encoding lacks
        return _from_bytes(value)
    return value


def _from_bytes(value: str) -> str:
    """A text in UTF-8 that a shell gave to a program in an ASCII locale."""
    try:
        return os.fsencode(value).decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"is not UTF-8 (byte {error.start})") from error


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}


def escaped(value: str) -> str:
    """A text of at least one character with escapes: ``\\n``, ``\\t``, ``\\xHH``, ``\\uHHHH``, ``\\\\``.

    Any other character after a backslash stays as it is, with the backslash.
    """

    def meant(found: re.Match[str]) -> str:
        code = found[1]
        is_number = len(code) > 1 and not "\ud800" <= chr(int(code[1:], 16)) <= "\udfff"
        return chr(int(code[1:], 16)) if is_number else _ESCAPES.get(code, found[0])

    return re.sub(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", meant, text(value))


def path(value: str) -> str:
    """The name of a file that is read; "~" is the home folder."""
    if not value:
        raise argparse.ArgumentTypeError("is empty: is a variable of the shell unset?")
    return os.path.expanduser(value)


def tools(value: str) -> list[dict[str, Any]]:
    """The function definitions in a JSON file: a list, or an object with a list as ``tools``."""
    from qwen3_moe_jax.text.chat_template import MessageError, check_tools

    file = path(value)
    try:
        content = json.loads(read_text(file))
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{file} is not JSON: {error}") from error
    found = content.get("tools") if isinstance(content, dict) else content
    if not isinstance(found, list) or not found or not all(isinstance(tool, dict) for tool in found):
        raise argparse.ArgumentTypeError(f"{file} has no list of function definitions")
    try:
        check_tools(found)
    except MessageError as error:
        raise argparse.ArgumentTypeError(f"{file}: {error}") from error
    return found


def template(value: str) -> str:
    """The text of a file with a chat template."""
    file = path(value)
    try:
        found = read_text(file)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not found.strip():
        raise argparse.ArgumentTypeError(f"{file} is empty: it needs a chat template")
    return found


def name(value: str) -> str:
    """A name of something, of at least one character."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty: is a variable of the shell unset?")
    return value


def output(*suffixes: str) -> Callable[[str], str]:
    """Names of files that can be written, with one of these suffixes (any if none is given)."""

    def parse(value: str) -> str:
        if value == "-":
            raise argparse.ArgumentTypeError("-: name a file, or /dev/stdout")
        try:
            return check_output(os.path.expanduser(value), suffixes)
        except OutputFileError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _parsed(kind: Callable[[str], Any], text: str, wanted: str) -> Any:
    if text.isascii() and "_" not in text:  # Python's own numbers: 1_0 is ten
        with contextlib.suppress(ValueError):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def mesh(value: str) -> str:
    """How a model is split over devices: ``tp=2,ep=1``, or ``auto``."""
    try:
        if value != AUTO_MESH:
            mesh_sizes(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value}: it must be such as tp=2,ep=1, or auto") from None
    return value

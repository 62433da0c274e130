"""Arguments of a wrong kind: one line that names the argument, what it was and what it must be."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.errors import printable
from qwen3_moe_jax.core.errors import KindError

_LONGEST_VALUE = 60


def check_number(name: str, value: object, kind: type = Integral) -> None:
    """Refuses what is no number: a text, a bool, or with ``Integral`` a float.

    Raises:
      KindError: naming ``name`` and the value.
    """
    if isinstance(value, bool) or not isinstance(value, kind):
        raise wrong_kind(name, value, "an integer" if kind is Integral else "a number")


def check_count(name: str, value: Any) -> None:
    """Refuses what is no integer of at least 1.

    Raises:
      KindError, ValueError: naming ``name`` and the value.
    """
    check_number(name, value)
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def check_text(name: str, value: object) -> None:
    """Refuses what is no ``str``. Raises KindError."""
    if not isinstance(value, str):
        raise wrong_kind(name, value, "a text")


def check_switch(name: str, value: object) -> None:
    """Refuses what is neither True nor False: the text "no" would count as True. Raises KindError."""
    if not isinstance(value, bool | np.bool_):
        raise wrong_kind(name, value, "True or False")


def check_list(name: str, value: Any) -> tuple[Any, ...]:
    """The items of a list, or of what else can be gone through; a text or a mapping is none.

    Raises:
      KindError: naming ``name`` and the value.
    """
    items: Any = value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise wrong_kind(name, items, "a list")
    return tuple(items)


def check_known(given: Iterable[str], known: Collection[str], others: Iterable[str] = ()) -> None:
    """Refuses the name of an option that there is not; ``others`` may be meant by it.

    Raises:
      TypeError: as Python does for a keyword.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *others], n=1)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"there is no option {name!r}{guess}")


def wrong_kind(name: str, value: object, wanted: str) -> KindError:
    """The error; a long value is shown by its type alone."""
    shown = repr(value)
    is_short = len(shown) <= _LONGEST_VALUE and shown.isprintable()
    return KindError(f"{name} must be {wanted}, not {shown if is_short else printable(_type(value))}")


def _type(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"

"""What somebody may have meant by a name that is not there."""

import difflib
from collections.abc import Iterable


def near_names(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Two of the ``known`` names at most, the nearest first, whatever their case.

    Args:
      word: what was written.
      known: names that are there.
      cutoff: how like it they have to be, from 0 to 1 (``difflib``).
    """
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(by_lower), n=2, cutoff=cutoff)
    return [by_lower[name] for name in near]

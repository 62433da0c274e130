"""How the memory of a KV cache is divided into rows of several lengths, many short ones beside few long."""

from collections.abc import Iterator
from dataclasses import dataclass

RATIO = 8
"""A class's rows are so many times shorter than those of the class above it."""

MIN_CONTEXT = 4096
"""Rows are not made shorter than this to have more of them."""

LONGEST_SHARE = 0.75
"""The longest row takes at most this share of all positions where it cannot have all that it wants."""

FULL_SHARE = 0.5
"""Each class takes at most this share of what the classes above it have left; the shortest takes the rest."""


@dataclass(frozen=True)
class RowClass:
    """Rows of one length: how many, and the tokens of context that each has."""

    slots: int
    context: int


def plan_rows(
    positions: int, context: int, slots: int, *, spare: int, in_class: int | None = None
) -> tuple[RowClass, ...]:
    """Rows for at most ``slots`` sequences of up to ``context`` tokens; the shortest class first.

    Where every slot can have the whole context, there is one class.

    Args:
      positions: that fit the memory in all.
      context: the longest that is wanted.
      slots: at most so many rows.
      spare: positions that each row needs beside its context.
      in_class: at most so many rows in one class, if there are several; None is no bound.
    """
    if slots * (context + spare) <= positions:
        return (RowClass(slots, context),)
    longest = max(64, min(context, _tiles(positions - spare)))
    if slots > 1:
        longest = min(longest, max(MIN_CONTEXT, _tiles(positions * LONGEST_SHARE - spare)))
    lengths = list(_lengths(min(longest, max(64, _tiles(positions - spare)))))
    counts = _counts(lengths, positions, slots, spare, in_class or slots)
    if sum(counts) == 1:  # nothing fits beside it
        return (RowClass(1, max(64, min(context, _tiles(positions - spare)))),)
    return tuple(RowClass(n, c) for c, n in sorted(zip(lengths, counts, strict=True)) if n)


def plan_equal_rows(positions: int, context: int | None, maximum: int, slots: int, *, spare: int) -> RowClass:
    """Rows of one length for at most ``slots`` sequences: fewer, if a ``context`` is asked for, or shorter.

    Args:
      positions, spare: as of :func:`plan_rows`.
      maximum: the longest context that the model has.
    """
    longest = max(64, min(context or maximum, _tiles(positions - spare)))
    if context is None:
        longest = min(longest, max(MIN_CONTEXT, _tiles(positions / slots - spare)))
    return RowClass(max(1, min(slots, positions // (longest + spare))), longest)


def _tiles(positions: float) -> int:
    return int(positions) // 64 * 64


def _lengths(longest: int) -> Iterator[int]:
    """The classes' contexts, longest first."""
    yield longest
    while longest >= 2 * MIN_CONTEXT:
        longest = max(MIN_CONTEXT, _tiles(longest / RATIO))
        yield longest


def _counts(lengths: list[int], positions: int, slots: int, spare: int, maximum: int) -> list[int]:
    """Rows of each class: shares at first, then what is left goes to the longest that still fits."""
    counts: list[int] = []
    left = positions
    for i, length in enumerate(lengths):
        is_last = i == len(lengths) - 1
        share = left if is_last else left * FULL_SHARE
        kept = len(lengths) - 1 - i  # one slot at least for each class below
        count = min(int(share // (length + spare)), maximum, slots - sum(counts) - kept)
        count = max(count, int(not counts))
        counts.append(max(0, count))
        left -= counts[-1] * (length + spare)
    for i, length in enumerate(lengths):
        more = min(left // (length + spare), maximum - counts[i], slots - sum(counts))
        if more > 0:
            counts[i] += more
            left -= more * (length + spare)
    return counts

"""A program that is going to be needed, with the shapes of its arguments: what lists of programs hold."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from qwen3_moe_jax.jax_backend.programs import Program


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A program of the list.

    Attributes:
      program, arguments: ``program.prepare(**arguments)`` makes it.
      label: for people.
      cost: about how long it compiles, beside the others of the list.
    """

    program: Program
    arguments: dict[str, Any]
    label: str
    cost: float

    @property
    def is_ready(self) -> bool:
        """Whether it is in memory."""
        return self.program.is_ready(**self.arguments)

    @property
    def is_stored(self) -> bool:
        """Whether it is on disk."""
        return self.program.is_stored(**self.arguments)

    def load(self) -> bool:
        """Takes it from disk if it is there; returns whether it is in memory then."""
        return self.program.load(**self.arguments)

    def lower(self) -> None:
        """Loads it, or does what comes before its compilation."""
        self.program.lower(**self.arguments)

    def make(self) -> None:
        """Loads or compiles it."""
        self.program.prepare(**self.arguments)


def missing_of(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Those that neither memory nor the disk has."""
    return [one for one in wanted if not one.is_ready and not one.is_stored]


def long_of(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Those that take seconds to compile: other processes may do it (``programs.start_compilers``)."""
    return [one for one in wanted if one.program.is_long]

"""A program that is going to be needed, with the shapes of its arguments: what lists of programs hold."""

import dataclasses
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

    @property
    def is_missing(self) -> bool:
        """Whether it takes seconds to compile, and is not there."""
        return self.program.is_long and not self.is_ready and not self.is_stored

    def load(self) -> bool:
        """Takes it from disk if it is there; returns whether it is in memory then."""
        return self.program.load(**self.arguments)

    def lower(self) -> None:
        """Loads it, or does what comes before its compilation."""
        self.program.lower(**self.arguments)

    def make(self) -> None:
        """Loads or compiles it."""
        self.program.prepare(**self.arguments)

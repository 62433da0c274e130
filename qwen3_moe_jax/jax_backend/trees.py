"""Frozen dataclasses that go through jit as their fields do.

``flax.struct`` has the same, and importing it imports all of Flax: 0.4 s that a process which finds its
programs on disk has no other use for.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def static_field() -> Any:
    """A field that is part of the tree's structure: another value is another program."""
    return field(metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(static_field,))
def tree_dataclass(cls: type[T]) -> type[T]:
    """The decorator: a frozen dataclass whose fields are leaves, or static."""
    return jax.tree_util.register_dataclass(dataclass(frozen=True)(cls))

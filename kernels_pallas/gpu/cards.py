"""What is known of NVIDIA GPUs by their compute capability (``cards.toml``)."""

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("cards.toml")


@dataclass(frozen=True)
class Capability:
    """Limits of one compute capability, as ``cards.toml`` explains them; bytes and 32-bit registers."""

    version: str
    target: str
    shared_memory: int
    shared_memory_per_core: int
    registers_per_core: int
    multiprocessors: dict[str, int]

    @property
    def number(self) -> tuple[int, int]:
        """(major, minor)."""
        major, minor = self.version.split(".")
        return int(major), int(minor)


@functools.cache
def capabilities() -> dict[str, Capability]:
    """All of them, by version."""
    table = tomllib.loads(PATH.read_text(encoding="utf-8"))
    return {version: Capability(version, **values) for version, values in table.items()}


def capability(version: str) -> Capability | None:
    """The limits of a compute capability such as "8.9"; None where it is not known."""
    return capabilities().get(version)


def capability_of(target: str) -> Capability:
    """That of an architecture of ptxas such as "sm_89"."""
    return next(found for found in capabilities().values() if found.target == target)

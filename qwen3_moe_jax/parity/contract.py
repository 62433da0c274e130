"""The parity contract as data: clauses with their bounds, read from ``contract.toml``."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CONTRACT_PATH = Path(__file__).with_name("contract.toml")

REDUCED = "reduced"
"""Stands in a bound for every compute dtype below float32."""

NVIDIA, CPU = "NVIDIA GPU", "CPU"
"""Classes of devices, for bounds that differ between them."""


@dataclass(frozen=True)
class Clause:
    """One promise and how it can be falsified.

    Attributes:
      id: for example "PARITY-001".
      statement: what holds.
      measure: the one figure that the bound is on.
      kind: "at_least" or "at_most".
      bounds: the bound of each compute dtype or class of devices, or of "" for all.
      backends: which backends it speaks of; "file" for the file alone.
      test: pytest's name of the test that plants a fault and sees the clause fail.
    """

    id: str
    statement: str
    measure: str
    kind: str
    bounds: Mapping[str, float]
    backends: tuple[str, ...]
    test: str

    def bound(self, kind: str = "float32") -> float:
        """The bound that holds for a compute dtype, or for a class of devices.

        Raises:
          KeyError: the clause has none for it.
        """
        if "" in self.bounds:
            return self.bounds[""]
        if kind == "float64":
            kind = "float32"
        if kind not in self.bounds and REDUCED in self.bounds and kind not in (NVIDIA, CPU):
            kind = REDUCED
        return self.bounds[kind]

    def holds(self, figure: float, kind: str = "float32") -> bool:
        """Whether a figure keeps the bound; NaN never does."""
        bound = self.bound(kind)
        return figure >= bound if self.kind == "at_least" else figure <= bound


@dataclass(frozen=True)
class Contract:
    """All clauses, in the order in which they are checked.

    Attributes:
      version: changes when the meaning or the bound of a clause does.
      clauses: by id.
    """

    version: int
    clauses: Mapping[str, Clause]


@cache
def load_contract() -> Contract:
    """Reads ``contract.toml``.

    Raises:
      ValueError: a clause lacks a field or is there twice.
    """
    with open(CONTRACT_PATH, "rb") as file:
        data = tomllib.load(file)
    clauses: dict[str, Clause] = {}
    for row in data["clause"]:
        clause = _clause(row)
        if clause.id in clauses:
            raise ValueError(f"{CONTRACT_PATH.name}: clause {clause.id} is there twice")
        clauses[clause.id] = clause
    return Contract(data["version"], clauses)


def _clause(row: Mapping[str, Any]) -> Clause:
    kinds = [kind for kind in ("at_least", "at_most") if kind in row]
    needed = {"id", "statement", "measure", "backends", "test"}
    if len(kinds) != 1 or needed - row.keys():
        raise ValueError(
            f"{CONTRACT_PATH.name}: clause {row.get('id')} needs {', '.join(sorted(needed))} and one bound"
        )
    bound = row[kinds[0]]
    bounds = dict(bound) if isinstance(bound, Mapping) else {"": float(bound)}
    return Clause(
        row["id"], row["statement"], row["measure"], kinds[0], bounds, tuple(row["backends"]), row["test"]
    )

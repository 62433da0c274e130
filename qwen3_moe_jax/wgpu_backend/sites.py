"""Dispatches and their grids.

A :class:`Site` is one dispatch of the forward pass. Its grid follows from the
number of tokens of a pass, so that one set of sites serves every prompt.
"""

from dataclasses import dataclass
from typing import Any

from qwen3_moe_jax.wgpu_backend.device import Dispatch, Launch


@dataclass(frozen=True, eq=False)
class Site:
    """One dispatch of a pass.

    Attributes:
      dispatch: the kernel and its resources.
      x: workgroups in x.
      y: what the grid's y follows: "once", "tokens", "token tiles", "pairs", "pair tiles"
        or "head tiles".
      spans: for attention and merge, cache positions per workgroup; 0 otherwise.
      merge: runs only where there is more than one span.
      nbytes: bytes of weights that it reads: of all its matrices, of one expert, or of one token's row.
      taps: stages that can be read after this dispatch.
      tile: tokens or pairs of one tile.
      max_spans: of one token; 0 for as many as there are.
    """

    dispatch: Dispatch
    x: int
    y: str = "once"
    tile: int = 1
    spans: int = 0
    merge: bool = False
    nbytes: int = 0
    taps: tuple[Any, ...] = ()
    max_spans: int = 0


@dataclass(frozen=True)
class Shape:
    """What grids follow from.

    Attributes:
      experts, chosen: E and X.
    """

    experts: int
    chosen: int

    def launch(self, site: Site, position: int, tokens: int, head_rows: int) -> Launch | None:
        """The site's grid for ``tokens`` tokens from ``position``; None where it has nothing to do."""
        y = self._rows(site.y, site.tile, tokens, head_rows)
        z = -(-(position + tokens) // site.spans) if site.spans else 1
        z = min(z, site.max_spans or z)
        if site.merge:
            return (site.dispatch, site.x, y, 1) if z > 1 else None
        return site.dispatch, site.x, y, z

    def _rows(self, follows: str, tile: int, tokens: int, head_rows: int) -> int:
        pairs = tokens * self.chosen
        return {
            "once": 1,
            "tokens": tokens,
            "token tiles": -(-tokens // tile),
            "pairs": pairs,
            "pair tiles": max_tiles(pairs, self.experts, tile),
            "head tiles": -(-head_rows // tile),
        }[follows]


def max_tiles(pairs: int, experts: int, tile: int) -> int:
    """Upper bound on the tiles that group.wgsl makes."""
    return pairs // tile + min(pairs, experts)

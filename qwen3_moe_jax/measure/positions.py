"""Perplexity by a token's position in its window, and along the text: what a picture of it needs."""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Positions:
    """Sums over windows.

    Attributes:
      count, total, squares: [context], over the tokens scored at each position of a window: how many, the
        sum of their negative log-likelihoods, and of the squares.
      along: for each window (first token, end, mean negative log-likelihood).
    """

    count: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    along: list[tuple[int, int, float]] = field(default_factory=list)

    @classmethod
    def empty(cls, context: int) -> "Positions":
        """Nothing scored yet."""
        return cls(np.zeros(context, np.int64), np.zeros(context), np.zeros(context))

    def add(self, first: int, start: int, log_likelihoods: np.ndarray) -> None:
        """One window more.

        Args:
          first: the first token scored.
          start: of the window.
          log_likelihoods: float64 of the tokens from ``first`` on.
        """
        loss = -log_likelihoods
        at = slice(first - start, first - start + len(loss))
        self.count[at] += 1
        self.total[at] += loss
        self.squares[at] += loss**2
        self.along.append((first, first + len(loss), float(loss.mean())))

    def bins(self, maximum: int = 24) -> list[tuple[float, float, float]]:
        """(position, perplexity, its standard error) over ranges of positions, from few to many tokens.

        Ranges grow by the same factor, so that the first tokens, where most changes, are seen.
        """
        scored = np.flatnonzero(self.count)
        if not scored.size:
            return []
        low, high = int(scored[0]), int(scored[-1]) + 1
        edges = np.unique(np.geomspace(max(low, 1), high, maximum + 1).round().astype(int))
        edges[0] = low
        found = []
        for start, end in itertools.pairwise(edges):
            count = int(self.count[start:end].sum())
            if count > 1:
                found.append(self._bin(start, end, count))
        return found

    def _bin(self, start: int, end: int, count: int) -> tuple[float, float, float]:
        mean = self.total[start:end].sum() / count
        variance = max(self.squares[start:end].sum() / count - mean**2, 0.0)
        value = math.exp(min(mean, 700.0))
        return (start + end - 1) / 2, value, value * math.sqrt(variance / (count - 1))

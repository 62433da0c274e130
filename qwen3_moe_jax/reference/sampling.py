"""The meaning of ``Sampling``, in NumPy: one token from one row of logits."""

from collections.abc import Sequence

import numpy as np

from qwen3_moe_jax.core.sampling import Sampling


def penalize(logits: np.ndarray, sampling: Sampling, seen: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Penalties on logits [V]: repetition for tokens seen (prompt or output), presence for tokens written.

    Both masks are bool [V].
    """
    scaled = np.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    return np.where(seen, scaled, logits) - sampling.presence_penalty * written


def token_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities [V] after temperature, top-k, top-p and min-p; ``temperature`` must be above 0."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = np.exp(scaled[order] - scaled[order[0]])
    if sampling.top_k:
        kept[sampling.top_k :] = 0
    kept /= kept.sum()
    before = np.cumsum(kept) - kept
    kept[before >= sampling.top_p] = 0
    kept[kept < sampling.min_p * kept[0]] = 0
    probs = np.zeros_like(kept)
    probs[order] = kept / kept.sum()
    return probs


class Sampler:
    """Chooses tokens one after the other, remembering what it wrote."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int]):
        self._sampling = sampling
        self._rng = np.random.default_rng(sampling.seed)
        self._prompt_ids = np.asarray(prompt_ids)
        self._written_ids: list[int] = []

    def choose(self, logits: np.ndarray) -> int:
        """The next token id, from logits [V]."""
        seen, written = np.zeros(logits.shape, bool), np.zeros(logits.shape, bool)
        written[self._written_ids] = True
        seen[self._prompt_ids] = True
        logits = penalize(logits, self._sampling, seen | written, written)
        if self._sampling.temperature == 0:
            token = int(np.argmax(logits))
        else:
            token = int(self._rng.choice(logits.size, p=token_probabilities(logits, self._sampling)))
        self._written_ids.append(token)
        return token

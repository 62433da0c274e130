"""How far two results are apart, in float64, with numbers that are not finite counted as wrong.

Every function takes rows of logits or vectors and gives one figure per row. A
NaN or an infinity anywhere in a row makes that row's figure the worst there
is, never a NaN that compares false with every bound.
"""

import numpy as np

WORST_COSINE = -1.0


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"cannot compare shapes {a.shape} and {b.shape}")
    return a, b


def _finite_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isfinite(a).all(axis=-1) & np.isfinite(b).all(axis=-1)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of a [..., V] and b [..., V] over the last axis: float64 [...].

    Two zero rows agree (1); a zero row against another does not (0). A row
    with a number that is not finite has -1.
    """
    a, b = _pair(a, b)
    finite = _finite_rows(a, b)
    a, b = np.where(finite[..., None], a, 0.0), np.where(finite[..., None], b, 0.0)
    norm_a, norm_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    both = norm_a * norm_b
    value = np.sum(a * b, axis=-1) / np.where(both == 0, 1.0, both)
    value = np.where((norm_a == 0) & (norm_b == 0), 1.0, value)
    return np.where(finite, np.clip(value, -1.0, 1.0), WORST_COSINE)


def nmse(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """``|actual - expected|^2 / |expected|^2`` over the last axis: float64 [...].

    Infinite for a row that is not finite, and for a nonzero row where zeros are expected.
    """
    actual, expected = _pair(actual, expected)
    finite = _finite_rows(actual, expected)
    error = np.where(finite[..., None], actual - expected, 0.0)
    power = np.sum(np.where(finite[..., None], expected, 0.0) ** 2, axis=-1)
    error = np.sum(error**2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.where(error == 0, 0.0, error / power)
    return np.where(finite, value, np.inf)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def kl_divergence(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """KL(expected || actual) in nats of the distributions that two rows of logits mean: float64 [...].

    Infinite for a row that is not finite.
    """
    expected, actual = _pair(expected, actual)
    finite = _finite_rows(expected, actual)
    safe = finite[..., None]
    log_p = log_softmax(np.where(safe, expected, 0.0))
    log_q = log_softmax(np.where(safe, actual, 0.0))
    value = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    return np.where(finite, np.maximum(value, 0.0), np.inf)


def top1_agrees(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Whether the largest logit of each row is the same one: bool [...]; not where a row is not finite."""
    expected, actual = _pair(expected, actual)
    return (expected.argmax(axis=-1) == actual.argmax(axis=-1)) & _finite_rows(expected, actual)


def expert_overlap(expected_ids: np.ndarray, actual_ids: np.ndarray) -> np.ndarray:
    """Share of the expected experts [..., X] that are among the actual ones [..., X]: float64 [...]."""
    expected_ids, actual_ids = np.asarray(expected_ids), np.asarray(actual_ids)
    if expected_ids.shape != actual_ids.shape:
        raise ValueError(f"cannot compare shapes {expected_ids.shape} and {actual_ids.shape}")
    same = expected_ids[..., :, None] == actual_ids[..., None, :]
    return same.any(axis=-1).mean(axis=-1)


def router_margin(logits: np.ndarray, num_experts_per_tok: int) -> np.ndarray:
    """Least chosen router logit minus the greatest one that is not chosen: float64 [...] of logits [..., E].

    An error below half of it cannot change which experts are chosen. Infinite
    when every expert is chosen.
    """
    logits = np.asarray(logits, np.float64)
    if num_experts_per_tok == logits.shape[-1]:
        return np.full(logits.shape[:-1], np.inf)
    ordered = np.sort(logits, axis=-1)[..., ::-1]
    return ordered[..., num_experts_per_tok - 1] - ordered[..., num_experts_per_tok]


def top_experts(logits: np.ndarray, num_experts_per_tok: int) -> np.ndarray:
    """Ids of the greatest router logits, greatest first, the lower id first among equals: int32 [..., X]."""
    return np.argsort(-logits, axis=-1, kind="stable")[..., :num_experts_per_tok].astype(np.int32)

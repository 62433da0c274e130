"""How far one file of a model is from another: KL divergence and agreement of the likeliest token.

At each scored token of a text (the windows of ``measure.perplexity``) the base gives a distribution P over
the vocabulary and the model Q. ``KL(P || Q) = sum p ln(p / q)`` in nats is what llama.cpp's
``llama-perplexity --kl-divergence`` reports too (tools/perplexity/perplexity.cpp of commit 050fc7f32); there
the base's logits are rounded to 16 bits first, here both are float32 and sums are float64.

Both models may be held at once, window by window. Where memory has room for one, the base's logits of the
whole text are kept in a temporary file (:class:`StoredLogits`).
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen3_moe_jax.core.errors import NumericalError
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.measure.perplexity import Cut, OverWindows, Window
from qwen3_moe_jax.text.tokenizer import Tokenizer

ROWS_AT_A_TIME = 32
"""Rows of two float64 distributions over 151,936 tokens: 78 MB."""

Logits = NDArray[np.float32]
LogitsOf = Callable[[int, Window], Logits]
"""Logits [T, V] before each scored token of a window, by the window's number."""


def runner_logits(runner: Runner, cut: Cut) -> LogitsOf:
    """The logits of a model that is loaded.

    Raises (when called):
      NumericalError: logits that are not finite.
    """

    def of(_: int, window: Window) -> Logits:
        found = runner.forward(cut.seen(window)).logits[window.first - window.start - 1 : -1]
        found = np.asarray(found, np.float32)
        if not np.isfinite(found).all():
            raise NumericalError(
                f"the {runner.name} backend's logits are not finite in the window of tokens {window.start} "
                f"to {window.end - 1}: run `qwen3-moe trace` to find the first stage that is not"
            )
        return found

    return of


class StoredLogits:
    """Logits of a whole text in a temporary file, float32, for when their model is gone. A context manager.

    Raises:
      ValueError: the folder of temporary files has no room for them.
    """

    def __init__(self, cut: Cut, vocab_size: int):
        self._first = np.cumsum([0, *(w.end - w.first for w in cut.windows)]).tolist()
        nbytes = self._first[-1] * vocab_size * 4
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise ValueError(
                f"memory holds one of the two models at a time, and the logits of the other take "
                f"{nbytes / 1e9:.1f} GB; {folder} has {free / 1e9:.1f} GB free: take a shorter text, or set "
                "TMPDIR to a folder with more room"
            )
        self._file = tempfile.TemporaryFile(prefix="qwen3-moe-logits-")  # noqa: SIM115 (closed by __exit__)
        self._file.truncate(max(nbytes, 1))
        self._rows = np.memmap(self._file, np.float32, "r+", shape=(self._first[-1], vocab_size))

    def keep(self, number: int, logits: Logits) -> None:
        """Stores a window's."""
        self._rows[self._first[number] : self._first[number + 1]] = logits

    def of(self, number: int, _: Window) -> Logits:
        """A window's, as :data:`LogitsOf`."""
        return self._rows[self._first[number] : self._first[number + 1]]

    def __enter__(self) -> "StoredLogits":
        return self

    def __exit__(self, *exc_info: object) -> None:
        del self._rows
        self._file.close()


@dataclass(frozen=True)
class Divergence(OverWindows):
    """Of a model from a base, after all windows of a text or after the first of them.

    Attributes:
      kl, kl_error: mean KL(base || model) in nats per token, and its standard error.
      kl_median, kl_99, kl_max: of all tokens; the second is the 99th percentile.
      top_1, top_1_error: share of tokens whose likeliest token is the same, and its standard error.
      perplexity, base_perplexity: of the same tokens.
      tokens_scored: how many the means are over.
      windows, windows_in_all: done, and in all.
      seconds: since the first window began.
    """

    kl: float
    kl_error: float
    kl_median: float
    kl_99: float
    kl_max: float
    top_1: float
    top_1_error: float
    perplexity: float
    base_perplexity: float
    tokens_scored: int
    windows: int
    windows_in_all: int
    seconds: float


def divergences(cut: Cut, model: LogitsOf, base: LogitsOf) -> Iterator[Divergence]:
    """The divergence after one window, after two, ... after all of them."""
    began = time.perf_counter()
    columns: list[np.ndarray] = []
    for number, window in enumerate(cut.windows):
        targets = cut.ids[window.first : window.end]
        columns.append(compare(model(number, window), base(number, window), targets))
        yield _summary(np.concatenate(columns, axis=1), number + 1, len(cut.windows), began)


def compare(model: Logits, base: Logits, targets: NDArray[np.integer]) -> np.ndarray:
    """Float64 [4, T]: KL(base || model), whether the likeliest agrees, ln q and ln p of the targets.

    Args:
      model, base: logits [T, V].
      targets: the token ids that came, [T].
    """
    starts = range(0, len(targets), ROWS_AT_A_TIME)
    parts = [slice(start, start + ROWS_AT_A_TIME) for start in starts]
    return np.concatenate([_compare(model[p], base[p], targets[p]) for p in parts], axis=1)


def _compare(model: Logits, base: Logits, targets: NDArray[np.integer]) -> np.ndarray:
    log_q, log_p = _log_softmax(model), _log_softmax(base)
    rows = np.arange(len(targets))
    kl = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1), 0.0)
    agrees = model.argmax(axis=-1) == base.argmax(axis=-1)
    return np.stack([kl, agrees.astype(np.float64), log_q[rows, targets], log_p[rows, targets]])


def _log_softmax(logits: Logits) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def _summary(columns: np.ndarray, windows: int, windows_in_all: int, began: float) -> Divergence:
    kl, agrees, log_q, log_p = columns
    median, near_all = np.quantile(kl, (0.5, 0.99)).tolist()
    return Divergence(
        kl=float(kl.mean()),
        kl_error=_standard_error(kl),
        kl_median=median,
        kl_99=near_all,
        kl_max=float(kl.max()),
        top_1=float(agrees.mean()),
        top_1_error=_standard_error(agrees),
        perplexity=_perplexity(log_q),
        base_perplexity=_perplexity(log_p),
        tokens_scored=len(kl),
        windows=windows,
        windows_in_all=windows_in_all,
        seconds=time.perf_counter() - began,
    )


def _standard_error(values: np.ndarray) -> float:
    """Of the mean, for values taken as independent; infinite for one."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _perplexity(log_likelihoods: np.ndarray) -> float:
    mean = -float(log_likelihoods.mean())
    return math.exp(mean) if mean < 709 else math.inf


def check_same_vocabulary(cut: Cut, tokenizer: Tokenizer, base: Tokenizer, text: str, name: str) -> None:
    """Raises ValueError where the base reads the text as other tokens, or has other ones."""
    if base.vocab_size != tokenizer.vocab_size or base.encode(text) != cut.ids.tolist():
        raise ValueError(f"{name} has another vocabulary: two files of one model can be compared")

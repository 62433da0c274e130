"""Perplexity of a text: how well a model expects what comes next, by the two definitions that are in use.

A text of N tokens is cut into windows of C tokens (``context``), each of which runs on an empty
cache. Perplexity is ``exp(-mean ln p(token | the tokens before it in its window))`` over the
tokens that are scored, and which these are is what definitions differ in:

- ``stride=None``, as llama.cpp's ``llama-perplexity`` (commit 050fc7f32, tools/perplexity/
  perplexity.cpp, ``perplexity``): floor(N / C) windows beside each other, and in each the tokens
  at offsets C // 2 + 1 to C - 1, so that all of them have at least half a window before them. The
  last N mod C tokens are left out. A model whose texts begin with a BOS token has it in place of
  each window's first token.
- ``stride=S``, as Hugging Face's "Perplexity of fixed-length models"
  (https://huggingface.co/docs/transformers/perplexity): windows begin every S tokens, the last
  one ends with the text, and each scores the tokens that no window before it has seen. Every token
  but the first is scored once, with at least C - S tokens before it (S = C: those that begin a
  window are not scored, for nothing is before them). Here each token counts alike; that recipe's
  own code weights a window's mean by one token less than it has where windows overlap.

The standard error is llama.cpp's: perplexity times the standard error of the mean of the
log-likelihoods, which takes tokens for independent.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_moe_jax.core.arguments import check_number
from qwen3_moe_jax.core.errors import NumericalError
from qwen3_moe_jax.core.runner import Runner
from qwen3_moe_jax.measure.positions import Positions
from qwen3_moe_jax.text.tokenizer import Tokenizer

DEFAULT_CONTEXT = 512
"""Tokens of a window, which is llama-perplexity's default."""

MIN_CONTEXT = 4


@dataclass(frozen=True)
class Window:
    """Tokens start .. end - 1 of a text, of which those from ``first`` on are scored."""

    start: int
    end: int
    first: int


def windows(num_tokens: int, context: int, stride: int | None = None) -> list[Window]:
    """The windows of a text; see the module's text for the two definitions."""
    if stride is None:
        starts = range(0, num_tokens - context + 1, context)
        return [Window(s, s + context, s + context // 2 + 1) for s in starts]
    found, seen = [], 0
    for start in range(0, num_tokens, stride):
        end = min(start + context, num_tokens)
        window = Window(start, end, max(seen, start + 1))
        if window.first < end:
            found.append(window)
        if end == num_tokens:
            break
        seen = end
    return found


@dataclass(frozen=True)
class Cut:
    """A text as token ids, and its windows.

    Attributes:
      ids: int32 [N].
      windows: in their order; at least one.
      bos_id: what stands in the place of each window's first token; None for that token itself.
    """

    ids: np.ndarray
    windows: list[Window]
    bos_id: int | None

    def seen(self, window: Window) -> np.ndarray:
        """The ids that a model reads for a window."""
        seen = self.ids[window.start : window.end].copy()
        if self.bos_id is not None:
            seen[0] = self.bos_id
        return seen


def cut_text(max_context: int, tokenizer: Tokenizer, text: str, context: int, stride: int | None) -> Cut:
    """Cuts a text into windows for a model loaded for ``max_context``; the rest as ``estimates``."""
    check_windows(context, stride)
    if context > max_context:
        raise ValueError(f"a context of {context} tokens: the model was loaded for {max_context}")
    ids = np.asarray(tokenizer.encode(text), np.int32)
    cut = windows(len(ids), context, stride)
    if not cut:
        minimum = context if stride is None else 2
        raise ValueError(
            f"the text has {len(ids)} tokens and at least {minimum} are needed"
            + (": take a longer text or a smaller --context" if stride is None else "")
        )
    return Cut(ids, cut, tokenizer.bos_id if stride is None else None)


class OverWindows:
    """Figures of a text after some of its windows: fields of a dataclass without others inside.

    Attributes:
      windows, windows_in_all: done, and in all.
      seconds: since the first window began.
    """

    windows: int
    windows_in_all: int
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether every window is in it."""
        return self.windows == self.windows_in_all

    @property
    def seconds_left(self) -> float:
        """An estimate, from the mean time of a window so far."""
        return (self.windows_in_all - self.windows) * self.seconds / self.windows

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: that is None."""
        fields = {k: None if v == math.inf else v for k, v in vars(self).items()}
        return {**fields, "complete": self.is_complete}


@dataclass(frozen=True)
class Perplexity(OverWindows):
    """A perplexity, after all windows of a text or after the first of them.

    Attributes:
      perplexity: exp of the mean negative log-likelihood of the tokens scored.
      standard_error: of it; infinite for a single token.
      bits_per_byte: negative log-likelihood over the bytes of the tokens scored, in bits: what does
        not depend on a tokenizer.
      tokens_scored: how many the mean is over.
      text_tokens: of the whole text.
      windows, windows_in_all: done, and in all.
      context, stride: as asked.
      seconds: since the first window began.
      tokens_per_s: tokens that ran through the model per second, the first window (which may
        compile) left out where there are others.
    """

    perplexity: float
    standard_error: float
    bits_per_byte: float
    tokens_scored: int
    text_tokens: int
    windows: int
    windows_in_all: int
    context: int
    stride: int | None
    seconds: float
    tokens_per_s: float


def check_windows(context: int, stride: int | None) -> None:
    """Raises ValueError for lengths that no text could be cut into."""
    check_number("context", context)
    if stride is not None:
        check_number("stride", stride)
    if context < MIN_CONTEXT:
        raise ValueError(f"a context of {context} tokens: a window needs at least {MIN_CONTEXT}")
    if stride is not None and not 1 <= stride <= context:
        raise ValueError(f"a stride of {stride} tokens: it must be from 1 to the context, {context}")


def estimates(
    runner: Runner,
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int = DEFAULT_CONTEXT,
    stride: int | None = None,
    positions: Positions | None = None,
) -> Iterator[Perplexity]:
    """The perplexity of ``text`` after one window, after two, ... after all of them.

    Args:
      runner: the backend.
      tokenizer: the model's.
      text: control tokens in it count as the characters they are.
      context: tokens of a window.
      stride: tokens from one window's beginning to the next one's; None is llama-perplexity's
        definition.
      positions: is added to, window by window.

    Raises:
      ValueError: lengths that do not fit each other or the runner, or a text without one window.
      NumericalError: a log-likelihood was not finite.
    """
    cut = cut_text(runner.max_context, tokenizer, text, context, stride)
    ids = cut.ids
    nbytes = np.asarray([len(tokenizer.token_bytes(int(i), show_control=True)) for i in ids])
    tally = _Tally(len(ids), len(cut.windows), context, stride)
    for window in cut.windows:
        scored = _score(runner, cut, window)
        if positions is not None:
            positions.add(window.first, window.start, scored)
        yield tally.add(scored, int(nbytes[window.first : window.end].sum()), window)


def measure_perplexity(runner: Runner, tokenizer: Tokenizer, text: str, **options: Any) -> Perplexity:
    """The perplexity of a whole text; arguments and errors as ``estimates``."""
    *_, last = estimates(runner, tokenizer, text, **options)
    return last


def _score(runner: Runner, cut: Cut, window: Window) -> np.ndarray:
    """Log-likelihoods, float64, of a window's scored tokens."""
    found = runner.log_likelihoods(cut.seen(window), first=window.first - window.start).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise NumericalError(
            f"the {runner.name} backend's logits are not finite at token {window.first + bad[0] - 1} of the "
            "text: run `qwen3-moe trace` to find the first stage that is not"
        )
    return found


class _Tally:
    """Sums over the windows so far."""

    def __init__(self, text_tokens: int, windows_in_all: int, context: int, stride: int | None):
        self._facts = {
            "text_tokens": text_tokens,
            "windows_in_all": windows_in_all,
            "context": context,
            "stride": stride,
        }
        self._began = time.perf_counter()
        self._first_took = 0.0
        self._count = self._nbytes = self._windows = self._ran = self._ran_first = 0
        self._sum = self._squares = 0.0

    def add(self, log_likelihoods: np.ndarray, nbytes: int, window: Window) -> Perplexity:
        """One window more."""
        seconds = time.perf_counter() - self._began
        self._windows += 1
        self._count += len(log_likelihoods)
        self._nbytes += nbytes
        self._ran += window.end - window.start
        self._sum -= float(log_likelihoods.sum())
        self._squares += float((log_likelihoods**2).sum())
        if self._windows == 1:
            self._first_took, self._ran_first, rate = seconds, self._ran, self._ran / seconds
        else:
            rate = (self._ran - self._ran_first) / (seconds - self._first_took)
        mean = self._sum / self._count
        variance = max(self._squares / self._count - mean * mean, 0.0)
        error = math.sqrt(variance / (self._count - 1)) if self._count > 1 else math.inf
        return Perplexity(
            perplexity=_exp(mean),
            standard_error=_exp(mean) * error,
            bits_per_byte=self._sum / math.log(2) / self._nbytes if self._nbytes else math.inf,
            tokens_scored=self._count,
            windows=self._windows,
            seconds=seconds,
            tokens_per_s=rate,
            **self._facts,
        )


def _exp(mean: float) -> float:
    """exp, infinite beyond float64: a broken model's text can be that improbable."""
    return math.exp(mean) if mean < 709 else math.inf

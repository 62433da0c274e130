"""How much of prompts a step reads beside decoding, and how many tokens a dispatch writes: as much as lets
running streams go on."""

import math

PROMPT_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""What a step may read of prompts: powers of two, so that few shapes are compiled."""

CHUNKS = (16, 128, 512)
"""What a step may read of one prompt (``generate.PREFILL_CHUNKS``, which needs no import of JAX here)."""

FIRST = 128
"""Of a first step, of which nothing is known."""

FIRST_TOKENS = 2
"""Of a first dispatch, of which nothing is known."""

CROWD = 1.5
"""The share of its time that a step may take where prompts wait for one another."""

FORGETS = 100
"""Steps after which an amount that was not chosen any more is forgotten: what made it slow may have been
something else (a program was compiled)."""

SURPRISE = 1.5
"""A step that takes so many times its average may be chance, and the next ``FORGETS`` steps would pay for it:
it counts when the next one of its amount does so too."""


def _next(tokens: int) -> int:
    """The most that may be tried after an amount: twice as much, or as one prompt can read at a time."""
    return max([2 * tokens, *(n for n in CHUNKS if n <= 8 * tokens)])


class Pace:
    """Chooses amounts by what steps took.

    A step takes so long for its weights and its running sequences, and so long for each token that it reads:
    seconds per token would call a large amount slower than it is. So it keeps a moving average for each
    amount, goes to the next one when the line through the last two says that it fits, and back when not.
    """

    def __init__(self, seconds: float):
        """``seconds``: how long running answers may wait for a step that reads prompts."""
        self._limit = seconds
        self._seconds: dict[int, float] = {}
        self._ages: dict[int, int] = {}  # steps since an amount was chosen
        self._surprised: set[int] = set()  # amounts whose last step was slow for once
        self._alone: dict[int, float] = {}  # of steps beside which nothing was written: a beginning

    def prompt_tokens(self, *, is_decoding: bool, waiting: int = 1) -> int:
        """For the next step; with nobody to hold up, or no limit, the most.

        Args:
          is_decoding: whether answers are being written.
          waiting: prompts that are to be read.
        """
        if not is_decoding or math.isinf(self._limit):
            return PROMPT_TOKENS[-1]
        known = self._alone | self._seconds
        if not known:
            return FIRST
        limit, maximum = self._limit * (CROWD if waiting > 1 else 1), _next(max(known))
        fitting = [n for n in PROMPT_TOKENS if n <= maximum and self._expected(n) <= limit]
        return fitting[-1] if fitting else PROMPT_TOKENS[0]

    def _expected(self, tokens: int) -> float:
        """Seconds of a step; of an amount without an average, by those of its neighbours."""
        known = self._alone | self._seconds
        if tokens in known:
            return known[tokens]
        less, more = sorted(n for n in known if n < tokens), [n for n in known if n > tokens]
        if not less:
            return known[min(more)] * tokens / min(more)
        last = less[-1]
        if len(less) == 1:  # half of it is thought to be the step's own
            return known[last] * (0.5 + 0.5 * tokens / last)
        per_token = max((known[last] - known[less[-2]]) / (last - less[-2]), known[last] / last / 4)
        return known[last] + per_token * (tokens - last)

    def took(self, tokens: int, seconds: float, *, is_decoding: bool = True) -> None:
        """After a step that read ``tokens`` of prompts, which may be fewer than it was to read."""
        if not is_decoding:
            self._alone[tokens] = 0.5 * self._alone.get(tokens, seconds) + 0.5 * seconds
            return
        if self._alone or self._seconds:
            seconds = min(seconds, 4 * max(self._expected(tokens), self._limit))
        old = self._seconds.get(tokens, math.inf)
        if seconds > SURPRISE * old and tokens not in self._surprised:
            self._surprised.add(tokens)
            seconds = old
        else:
            self._surprised.discard(tokens)
        self._note(tokens, seconds)

    def _note(self, tokens: int, seconds: float) -> None:
        """Takes seconds into an amount's average."""
        old = self._seconds.get(tokens)  # a first one that was slow is tried again: it may have been chance
        now = min(seconds, self._limit) if old is None else 0.8 * old + 0.2 * seconds
        self._seconds[tokens] = now
        self._ages = {n: 0 if n == tokens else self._ages.get(n, 0) + 1 for n in self._seconds}
        for number in [n for n, age in self._ages.items() if age > FORGETS]:
            del self._seconds[number]


class Stride:
    """Chooses how many tokens a dispatch writes for each sequence, by what they took.

    A dispatch costs the host as much for one token as for many, and what comes meanwhile waits for its end:
    so it is as long as fits into a time. Sequences of one number take about as long as they did last.
    """

    def __init__(self, seconds: float, maximum: int):
        """``seconds``: how long a dispatch may take; ``maximum``: tokens of one, however fast they are."""
        self._limit, self._maximum = seconds, maximum
        self._seconds: dict[int, float] = {}  # of a token, by the number of sequences

    def tokens(self, sequences: int) -> int:
        """For the next dispatch; few for a number of sequences of which nothing is known."""
        if (seconds := self._seconds.get(sequences)) is None:
            return min(FIRST_TOKENS, self._maximum)
        return max(1, int(min(self._limit / seconds, self._maximum)))

    def took(self, sequences: int, tokens: int, seconds: float) -> None:
        """After a dispatch that wrote so many tokens for the longest of its sequences."""
        now = seconds / tokens
        old = self._seconds.get(sequences, now)
        self._seconds[sequences] = 0.5 * old + 0.5 * now

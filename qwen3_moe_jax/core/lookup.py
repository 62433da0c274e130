"""Prompt lookup: what a text says again is guessed from the text itself, and checked several tokens at once.

A draft is what followed an earlier place with the same last tokens. The model reads the last token and the
draft in one step; where its own next token is the draft's, the step has written it. So the answer is that
of decoding token by token, and a good guess only makes it come sooner (``docs/design/lookup.md``).

The idea of drafts that the model itself checks: Leviathan, Kalman, Matias (arXiv 2211.17192); that they
come from the prompt: Saxena, "Prompt Lookup Decoding" (2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_moe_jax.core.counted import counted

MIN_MATCH = 8
"""Tokens that must be the same before a place is taken for one that the text repeats."""

DRAFTS = (3, 7)
"""Tokens of a draft: a step of 4 or of 8."""

MAX_PLACES = 4
"""Earlier places that are compared, the latest ones."""

MAX_COMPARED = 64
"""Tokens before a place that are compared."""


BASE, MODULUS = 1_000_003, (1 << 61) - 1
"""Of the number that stands for a run of MIN_MATCH tokens; runs of one number are compared."""
LEAVING = pow(BASE, MIN_MATCH, MODULUS)


class Repeats:
    """A text's tokens, and where each run of MIN_MATCH of them ended.

    Numbers alone, no object per token: the garbage collector has nothing to look through.
    """

    def __init__(self, tokens: Sequence[int] = ()):
        self._tokens: list[int] = []
        self._run = 0
        self._latest: dict[int, int] = {}
        self._earlier: list[int] = [0]  # of each end the one before it with the same run, 0 for none
        self._behind = 0
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes the text's next tokens."""
        text, run = self._tokens, self._run
        for token in tokens:
            run = (run * BASE + token + 1) % MODULUS
            if len(text) >= MIN_MATCH:
                run = (run - (text[-MIN_MATCH] + 1) * LEAVING) % MODULUS
            text.append(token)
            self._earlier.append(self._latest.get(run, 0) if len(text) >= MIN_MATCH else 0)
            if len(text) >= MIN_MATCH:
                self._latest[run] = len(text)
        self._run = run

    def draft(self, count: int) -> list[int]:
        """The ``count`` tokens that followed the place that is most like the end of the text; [] for none.

        Of places that are alike for as long, the one that the last draft came from, then the latest. Where
        the text ends before the draft does, the draft goes on with its own beginning: a loop.
        """
        text = self._tokens
        here = len(text)
        if here <= MIN_MATCH or count < 1:
            return []
        places: list[int] = []
        place = self._earlier[here]
        while place and len(places) < MAX_PLACES:
            places.append(place)
            place = self._earlier[place]
        if self._behind:
            places.insert(0, here - self._behind)
        place = max(places, key=self._alike, default=0)  # the first of the best
        if self._alike(place) < MIN_MATCH:
            return []
        self._behind = here - place
        draft = list(text[place : place + count])
        while len(draft) < count:
            draft.append(draft[len(draft) - self._behind])
        return draft

    def _alike(self, place: int) -> int:
        """For how many tokens the text before a place is the text before its end, up to MAX_COMPARED."""
        text, here = self._tokens, len(self._tokens)
        maximum = min(MAX_COMPARED, place)
        return next((n for n in range(maximum) if text[place - 1 - n] != text[here - 1 - n]), maximum)


class Gate:
    """Whether to draft, and how much: an account in tokens.

    A step with a draft costs as many plain steps as its time says, and writes a token more than were right:
    the difference goes to the account, with SHARE of each token that was written without a draft. A draft is
    tried only while the account could pay for one without a right token. So the time that drafts cost is
    never more than that of START tokens and SHARE of the others.

    Attributes:
      costs: of a step with so many drafts, in plain steps: what is expected at first, then what is measured.
    """

    START, SHARE, MAXIMUM = 2.0, 0.01, 16.0
    RATE = 0.25
    """Weight of a new measurement; one that is far off, as on a busy machine, counts as twice or half."""

    def __init__(self) -> None:
        self.costs = {3: 2.0, 7: 3.0}
        self._account, self._seconds, self._level = self.START, 0.0, DRAFTS[0]

    def drafts(self) -> int:
        """How many tokens to draft now; 0 for none."""
        sizes = [n for n in DRAFTS if n <= self._level and self.costs[n] < 1 + n]
        return max((n for n in sizes if self.costs[n] <= 1 + self._account), default=0)

    def wrote(self, tokens: int, seconds: float) -> None:
        """Plain steps have written so many tokens in so many seconds."""
        if tokens > 0 and seconds > 0:
            each = seconds / tokens
            old = self._seconds or each
            self._seconds = old + self.RATE * (self._near(old, each) - old)
            self._add(self.SHARE * tokens)

    def tried(self, drafts: int, right: int, seconds: float, size: int | None = None) -> None:
        """A step of ``size`` drafts (None: ``drafts``) has written ``right`` of them and one token more."""
        size = drafts if size is None else size
        cost = self.costs[size]
        if self._seconds > 0 and seconds > 0:
            cost = self._near(cost, seconds / self._seconds)
            self.costs[size] += self.RATE * (cost - self.costs[size])
        self._add(1 + right - cost)
        if right == drafts:
            self._level = DRAFTS[-1]
        elif 2 * right < drafts:
            self._level = DRAFTS[0]

    @staticmethod
    def _near(old: float, new: float) -> float:
        return min(max(new, old / 2), old * 2)

    def _add(self, tokens: float) -> None:
        self._account = min(self._account + tokens, self.MAXIMUM)


@dataclass
class Drafts:
    """What became of the drafts of one text.

    Attributes:
      steps: that had a draft.
      drafted, accepted: tokens that were guessed, and those that the model wrote too.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def in_words(self) -> str:
        """ "drafts: 250 of 266 tokens right"."""
        return f"drafts: {self.accepted:,} of {counted(self.drafted, 'token')} right"


class PromptLookup:
    """Drafts of one text, while they are worth their time.

    Attributes:
      drafts: what became of them.
      gate: says whether they are worth it.
    """

    def __init__(self) -> None:
        self.drafts, self.gate, self._repeats = Drafts(), Gate(), Repeats()

    def begin(self, tokens: Sequence[int]) -> None:
        """The prompt."""
        self._repeats = Repeats(tokens)

    def draft(self, maximum: int) -> list[int]:
        """What may come next, at most ``maximum`` tokens; [] where nothing is guessed, or not worth it."""
        count = min(self.gate.drafts(), maximum)
        return self._repeats.draft(count) if count > 0 else []

    def wrote(self, tokens: Sequence[int], seconds: float) -> None:
        """Steps without a draft have written these."""
        self._repeats.extend(tokens)
        self.gate.wrote(len(tokens), seconds)

    def tried(self, draft: Sequence[int], tokens: Sequence[int], seconds: float) -> None:
        """A step with this draft has written these: one of the model's own comes last, unless it ended."""
        pairs = list(zip(draft, tokens, strict=False))
        right = next((i for i, (guess, token) in enumerate(pairs) if guess != token), len(pairs))
        self._repeats.extend(tokens)
        drafts = self.drafts
        drafts.steps, drafts.drafted = drafts.steps + 1, drafts.drafted + len(draft)
        drafts.accepted += right
        self.gate.tried(len(draft), right, seconds, size_of(len(draft)))


def size_of(drafts: int) -> int:
    """The DRAFTS of the step that takes so many."""
    return next(n for n in DRAFTS if n >= drafts)

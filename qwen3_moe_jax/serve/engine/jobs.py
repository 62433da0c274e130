"""What the scheduler is asked for, what it answers, and the queue between the two."""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from qwen3_moe_jax.core.batch import TokenScore
from qwen3_moe_jax.core.sampling import Sampling


@dataclass(frozen=True)
class Job:
    """One sequence to write.

    Attributes:
      id: unique while the job lives.
      key: jobs of one key are served in order, and keys take turns.
      token_ids: the prompt.
      scope: only jobs of the same scope may reuse what another one's prompt left in the cache; None reuses
        nothing and leaves nothing.
      is_resumed: goes on with an answer that had begun, before the others of its key.
      first_mask: bits of the tokens that may come first, int32 little-endian; None allows all.
      top: ``Wrote.scores`` are wanted, with so many rivals; None wants none.
    """

    id: int
    key: str
    token_ids: Sequence[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    scope: str | None = None
    is_resumed: bool = False
    first_mask: bytes | None = None
    top: int | None = None


@dataclass(frozen=True)
class Began:
    """A job has a slot; ``cached`` tokens of its prompt need not be read."""

    id: int
    cached: int


@dataclass(frozen=True)
class Wrote:
    """New tokens of a job, why it ended if it did, and the tokens' scores if they were asked for."""

    id: int
    tokens: list[int]
    finish_reason: str | None
    scores: list[TokenScore] | None = None


@dataclass(frozen=True)
class Failed:
    """A job has ended without an answer. ``code``: "invalid", "queue_full", "engine"."""

    id: int
    code: str
    message: str


Event = Began | Wrote | Failed


@dataclass(frozen=True)
class Limits:
    """Bounds of the queue: jobs and prompt tokens that wait for a slot."""

    jobs: int = 256
    tokens: int = 1 << 20


class Queued(Protocol):
    """What the queue asks of a job."""

    @property
    def id(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def is_resumed(self) -> bool: ...


J = TypeVar("J", bound=Queued)


class FairQueue(Generic[J]):
    """Jobs that wait: first in, first out within a key, one of each key in turn."""

    def __init__(self):
        self._keys: OrderedDict[str, deque[J]] = OrderedDict()
        self.tokens = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, job: J) -> None:
        line = self._keys.setdefault(job.key, deque())
        line.appendleft(job) if job.is_resumed else line.append(job)
        if job.is_resumed:
            self._keys.move_to_end(job.key, last=False)
        self._count += 1
        self.tokens += len(job.token_ids)

    def pop(self, fits: Callable[[J], bool] = lambda job: True) -> J | None:
        """The next job that fits; its key goes to the end of the round, those that were passed stay first."""
        key = next((key for key, line in self._keys.items() if fits(line[0])), None)
        if key is None:
            return None
        line = self._keys[key]
        job = line.popleft()
        self._keys.move_to_end(key) if line else self._keys.pop(key)
        self._took(job)
        return job

    def has(self, fits: Callable[[J], bool]) -> bool:
        """Whether the next job of some key fits."""
        return any(fits(line[0]) for line in self._keys.values())

    def remove(self, job_id: int) -> bool:
        """Whether this job was waiting; it no longer is."""
        for key, line in self._keys.items():
            job = next((j for j in line if j.id == job_id), None)
            if job is not None:
                line.remove(job)
                if not line:
                    self._keys.pop(key)
                self._took(job)
                return True
        return False

    def _took(self, job: J) -> None:
        self._count -= 1
        self.tokens -= len(job.token_ids)

"""Which request gets a slot, and when: one deterministic loop over the slots of a batch.

The scheduler knows no clock, no socket and no device. What it is told (requests, cancellations, budgets)
and what the batch answers decide everything it does, and ``log`` lists its decisions in order: ``replay``
carries them out again on another batch and gets the same tokens. Requests of one key are served in the
order of their arrival; keys take turns. A request that was admitted is never put back.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_moe_jax.core.runner import Batch, Progress
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.serve.engine.prefix import PrefixCache, Reuse


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


@dataclass(frozen=True)
class Began:
    """A job has a slot; ``cached`` tokens of its prompt need not be read."""

    id: int
    cached: int


@dataclass(frozen=True)
class Wrote:
    """New tokens of a job, and why it ended if it did."""

    id: int
    tokens: list[int]
    finish_reason: str | None


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


@dataclass
class Running:
    """A job in a slot, with what the scheduler has seen of it."""

    job: Job
    written: list[int] = field(default_factory=list)


class FairQueue:
    """Jobs that wait: first in, first out within a key, one of each key in turn."""

    def __init__(self):
        self._keys: OrderedDict[str, deque[Job]] = OrderedDict()
        self.tokens = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, job: Job) -> None:
        line = self._keys.setdefault(job.key, deque())
        line.appendleft(job) if job.is_resumed else line.append(job)
        if job.is_resumed:
            self._keys.move_to_end(job.key, last=False)
        self._count += 1
        self.tokens += len(job.token_ids)

    def pop(self) -> Job:
        """The next job; its key goes to the end of the round."""
        key, line = next(iter(self._keys.items()))
        job = line.popleft()
        self._keys.move_to_end(key) if line else self._keys.pop(key)
        self._took(job)
        return job

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

    def _took(self, job: Job) -> None:
        self._count -= 1
        self.tokens -= len(job.token_ids)


class Scheduler:
    """The loop: ``submit`` and ``cancel`` between turns, ``turn`` again and again while ``has_work``.

    Attributes:
      queue: jobs without a slot.
      running: slot to job.
      log: decisions since the start, if it is kept: ("admit", job, slot, reuse), ("free", slot),
        ("mask", slot, bits), ("step", tokens, prompt tokens, ahead), ("open",) for a new batch.
    """

    def __init__(
        self,
        open_batch: Callable[[], Batch],
        *,
        limits: Limits | None = None,
        prefixes: PrefixCache | None = None,
        max_step: int = 8,
        keep_log: bool = False,
    ):
        """Opens a batch.

        Args:
          open_batch: makes an empty batch; called again when a failed step took the batch's state with it.
          limits: of the queue.
          prefixes: what finds prompts that are in the cache already; None reuses nothing.
          max_step: tokens that a dispatch writes for each sequence while nobody waits.
          keep_log: keep ``log``.
        """
        self._open_batch = open_batch
        self.batch = open_batch()
        self.limits = limits or Limits()
        self.prefixes = prefixes
        self.queue = FairQueue()
        self.running: dict[int, Running] = {}
        self.log: list[tuple] | None = [] if keep_log else None
        self._max_step = max_step
        self._slots: dict[int, int] = {}  # job id to slot

    @property
    def has_work(self) -> bool:
        return bool(self.queue or self.running)

    @property
    def is_held(self) -> bool:
        """Whether a turn would do nothing: every sequence waits for its mask."""
        could_admit = bool(self.queue) and self.batch.free_slots > 0
        return not could_admit and self.batch.is_held

    @property
    def has_waiting_prompts(self) -> bool:
        """Whether a step is going to read a prompt."""
        return bool(self.queue and self.batch.free_slots) or bool(self.batch.waiting)

    @property
    def is_decoding(self) -> bool:
        """Whether some sequence has been read to its end."""
        return len(self.running) > self.batch.waiting

    def submit(self, job: Job) -> list[Event]:
        """Queues a job; the event says why not, if it cannot be."""
        if len(job.token_ids) >= self.batch.capacity:
            message = f"the prompt has {len(job.token_ids)} tokens and the context {self.batch.capacity}"
            return [Failed(job.id, "invalid", message)]
        is_full = len(self.queue) >= self.limits.jobs or (
            bool(self.queue) and self.queue.tokens + len(job.token_ids) > self.limits.tokens
        )
        if is_full and not job.is_resumed:
            return [Failed(job.id, "queue_full", "too many requests wait")]
        self.queue.push(job)
        return []

    def cancel(self, job_id: int) -> None:
        """Forgets a job wherever it is; one that has ended already is no fault."""
        if self.queue.remove(job_id):
            return
        slot = self._slots.get(job_id)
        if slot is not None:
            self._free(slot)

    def allow(self, job_id: int, mask: bytes) -> None:
        """The tokens that a masked job may write next; until then it waits."""
        slot = self._slots.get(job_id)
        if slot is not None:
            self.batch.allow(slot, mask)
            self._note("mask", slot, mask)

    def turn(self, *, prompt_tokens: int = 2048) -> list[Event]:
        """Admits what fits and takes one step of the batch.

        Args:
          prompt_tokens: about how much of prompts the step may read.
        """
        events = self._admit_all()
        if not self.running:
            return events
        is_held_up = bool(self.queue) or bool(self.batch.waiting)
        tokens = 1 if is_held_up else self._max_step
        ahead = 0 if is_held_up else self._max_step
        try:
            progress = self.batch.step(tokens, prompt_tokens=prompt_tokens, ahead=ahead)
        except Exception as error:
            return events + self._fail_all(error)
        self._note("step", tokens, prompt_tokens, ahead)
        return events + [self._take(p) for p in progress]

    def _admit_all(self) -> list[Event]:
        events: list[Event] = []
        while self.queue and self.batch.free_slots:
            job = self.queue.pop()
            try:
                events.append(self._admit(job))
            except ValueError as error:
                events.append(Failed(job.id, "invalid", str(error)))
        return events

    def _admit(self, job: Job) -> Began:
        options: dict[str, Any] = {
            "sampling": job.sampling,
            "max_tokens": min(job.max_tokens, self.batch.capacity - len(job.token_ids)),
            "stop_ids": job.stop_ids,
        }
        if job.first_mask is not None:
            options["mask"] = job.first_mask
        reuse = None
        if self.prefixes is not None:
            reuse = self.prefixes.prepare(self.batch, job.token_ids, job.scope, self._busy())
            options |= {"slot": reuse.slot, "filled": reuse.length}
        slot = self.batch.admit(job.token_ids, **options)
        self.running[slot] = Running(job)
        self._slots[job.id] = slot
        self._note("admit", job, slot, reuse)
        return Began(job.id, reuse.length if reuse else 0)

    def _busy(self) -> dict[int, Running]:
        return self.running

    def _take(self, progress: Progress) -> Wrote:
        running = self.running[progress.slot]
        running.written += progress.tokens
        if progress.finish_reason:
            self._free(progress.slot, is_sound=progress.finish_reason != "nonfinite")
        return Wrote(running.job.id, progress.tokens, progress.finish_reason)

    def _free(self, slot: int, *, is_sound: bool = True) -> None:
        running = self.running.pop(slot)
        del self._slots[running.job.id]
        if self.prefixes is not None:
            self.prefixes.leave(self.batch, slot, running.job, running.written, is_sound=is_sound)
        self.batch.free(slot)
        self._note("free", slot)

    def _fail_all(self, error: Exception) -> list[Event]:
        """Ends what is running after a step that failed; what waits goes on with a sound batch."""
        failed: list[Event] = [
            Failed(r.job.id, "engine", f"{type(error).__name__}: the engine's step failed")
            for r in self.running.values()
        ]
        if self.batch.is_whole:
            for slot in list(self.running):
                self._free(slot, is_sound=False)
        else:
            self.running.clear()
            self._slots.clear()
            if self.prefixes is not None:
                self.prefixes.forget_rows()
            self.batch = self._open_batch()
            self._note("open")
        return failed

    def _note(self, *decision: Any) -> None:
        if self.log is not None:
            self.log.append(decision)


def replay(log: Sequence[tuple], batch: Batch) -> dict[int, list[int]]:
    """Carries the decisions of a log out on another batch: the tokens of each job id.

    Raises:
      ValueError: the batch gave a job another slot than the log says.
    """
    written: dict[int, list[int]] = {}
    jobs: dict[int, int] = {}
    for name, *arguments in log:
        if name == "admit":
            job, slot, reuse = arguments
            options: dict[str, Any] = {"sampling": job.sampling, "stop_ids": job.stop_ids}
            options["max_tokens"] = min(job.max_tokens, batch.capacity - len(job.token_ids))
            if job.first_mask is not None:
                options["mask"] = job.first_mask
            if isinstance(reuse, Reuse):
                reuse.repeat(batch)
                options |= {"slot": reuse.slot, "filled": reuse.length}
            if batch.admit(job.token_ids, **options) != slot:
                raise ValueError(f"job {job.id} got another slot than {slot}")
            jobs[slot] = job.id
        elif name == "free":
            batch.free(arguments[0])
        elif name == "mask":
            batch.allow(*arguments)
        elif name == "step":
            tokens, prompt_tokens, ahead = arguments
            for progress in batch.step(tokens, prompt_tokens=prompt_tokens, ahead=ahead):
                written.setdefault(jobs[progress.slot], []).extend(progress.tokens)
    return written

"""Which request gets a slot, and when: one deterministic loop over the slots of a batch.

The scheduler knows no clock, no socket and no device. What it is told (requests, cancellations, budgets)
and what the batch answers decide everything it does, and ``log`` lists its decisions in order: ``replay``
carries them out again on another batch and gets the same tokens. Requests of one key are served in the
order of their arrival; keys take turns. A request that was admitted is never put back.

Where rows have several lengths, a request begins in the shortest that holds its prompt and ``HEADROOM``
tokens more, and moves to a longer one when it has outgrown that: the row is copied, nothing is read again.
A request that waits for a long row keeps later ones from taking it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_moe_jax.core.batch import Batch, Progress
from qwen3_moe_jax.serve.engine.jobs import Began, Event, Failed, FairQueue, Job, Limits, Wrote
from qwen3_moe_jax.serve.engine.prefix import PrefixCache, Reuse

HEADROOM = 512
"""New tokens that a request's first row has room for, if it may write so many."""


@dataclass
class Running:
    """A job in a slot, with what the scheduler has seen of it.

    Attributes:
      limit: new tokens that it may have in all.
      mask: of a job that has outgrown its row, the tokens that may come next, once they are known.
    """

    job: Job
    limit: int
    written: list[int] = field(default_factory=list)
    mask: bytes | None = None

    @property
    def can_move(self) -> bool:
        """Whether all is known that a new row needs."""
        return self.job.first_mask is None or self.mask is not None


class Scheduler:
    """The loop: ``submit`` and ``cancel`` between turns, ``turn`` again and again while ``has_work``.

    Attributes:
      queue: jobs without a slot.
      running: slot to job.
      log: decisions since the start, if it is kept: ("admit", job, slot, reuse), ("free", slot),
        ("move", slot, slot, tokens written, mask), ("mask", slot, bits), ("step", tokens, prompt tokens,
        ahead), ("open",) for a new batch.
    """

    def __init__(
        self,
        open_batch: Callable[[], Batch],
        *,
        limits: Limits | None = None,
        prefixes: PrefixCache | None = None,
        keep_log: bool = False,
    ):
        """Opens a batch.

        Args:
          open_batch: makes an empty batch; called again when a failed step took the batch's state with it.
          limits: of the queue.
          prefixes: what finds prompts that are in the cache already; None reuses nothing.
          keep_log: keep ``log``.
        """
        self._open_batch = open_batch
        self.batch = open_batch()
        self.limits = limits or Limits()
        self.prefixes = prefixes
        self.queue: FairQueue[Job] = FairQueue()
        self.running: dict[int, Running] = {}
        self.log: list[tuple] | None = [] if keep_log else None
        self._slots: dict[int, int] = {}  # job id to slot
        self._outgrown: list[int] = []  # slots whose jobs wait for a longer row, in order

    @property
    def has_work(self) -> bool:
        return bool(self.queue or self.running)

    @property
    def is_held(self) -> bool:
        """Whether a turn would do nothing: every sequence waits for its mask."""
        if self.batch.is_held or not self.batch.running:
            return not (self._movable() or self.queue.has(self._fits))
        return False

    @property
    def waiting_prompts(self) -> int:
        """How many prompts the next step chooses from."""
        return self.batch.waiting + min(len(self.queue), self.batch.free_slots)

    @property
    def is_decoding(self) -> bool:
        """Whether some sequence has been read to its end."""
        return len(self.running) > self.batch.waiting + len(self._outgrown)

    def submit(self, job: Job) -> list[Event]:
        """Queues a job; the event says why not, if it cannot be."""
        if len(job.token_ids) >= self.batch.capacity:
            message = f"the prompt has {len(job.token_ids)} tokens and the context {self.batch.capacity}"
            return [Failed(job.id, "invalid", message)]
        waiting = len(self.queue) - self.batch.free_slots  # the first get a slot in the next turn
        is_full = waiting >= self.limits.jobs or (
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
        if slot in self._outgrown:
            self.running[slot].mask = mask
        elif slot is not None:
            self.batch.allow(slot, mask)
            self._note("mask", slot, mask)

    def turn(self, *, prompt_tokens: int = 2048, max_step: int = 8) -> list[Event]:
        """Admits what fits and takes one step of the batch.

        Args:
          prompt_tokens: about how much of prompts the step may read.
          max_step: tokens that it writes for each sequence while nobody waits.
        """
        self._move_all()
        events = self._admit_all()
        if not self.running:
            return events
        tokens, ahead = self._step_size(max_step)
        try:
            progress = self.batch.step(tokens, prompt_tokens=prompt_tokens, ahead=ahead)
        except Exception as error:
            return events + self._fail_all(error)
        self._note("step", tokens, prompt_tokens, ahead)
        return events + [self._take(p) for p in progress]

    def _step_size(self, maximum: int) -> tuple[int, int]:
        """Tokens for each sequence of this step, and of the one after it: few while others wait for them."""
        if self.batch.waiting:
            maximum = 1
        elif self.queue:  # a slot that gets free in the middle of a step is taken after it
            maximum = max(1, maximum // 2)
        return maximum, maximum

    def _admit_all(self) -> list[Event]:
        events: list[Event] = []
        while self.batch.free_slots and (job := self.queue.pop(self._fits)) is not None:
            try:
                events.append(self._admit(job))
            except ValueError as error:
                events.append(Failed(job.id, "invalid", str(error)))
        return events

    @property
    def _max_room(self) -> int | None:
        """Rows longer than this are for those that have outgrown theirs; None: nobody has."""
        return min((self.batch.room(s) for s in self._outgrown), default=None)

    def _fits(self, job: Job) -> bool:
        """Whether there is a row for a job."""
        return bool(self._rows_for(_first_need(job, self.batch.capacity), max_room=self._max_room))

    def _rows_for(self, need: int, *, max_room: int | None = None) -> list[int]:
        """The free slots with the shortest rows that hold so many tokens."""
        room = self.batch.room
        free = [s for s in range(self.batch.slots) if s not in self.running and room(s) >= need]
        shortest = min((room(s) for s in free), default=0)
        if max_room is not None and shortest > max_room:
            return []
        return [s for s in free if room(s) == shortest]

    def _admit(self, job: Job) -> Began:
        free = self._rows_for(_first_need(job, self.batch.capacity), max_room=self._max_room)
        reuse = Reuse(free[0], 0)
        if self.prefixes is not None:
            reuse = self.prefixes.prepare(self.batch, job.token_ids, job.scope, self.running, free)
        slot = _put(self.batch, job, reuse)
        self.running[slot] = Running(job, _limit(job, self.batch.capacity))
        self._slots[job.id] = slot
        self._note("admit", job, slot, reuse)
        return Began(job.id, reuse.length)

    def _move_all(self) -> None:
        """Gives longer rows to those that have outgrown theirs, while there are some."""
        while (found := self._movable()) is not None:
            slot, free = found
            self._move(slot, self.prefixes.take(self.batch, free) if self.prefixes else free[0])

    def _movable(self) -> tuple[int, list[int]] | None:
        """The first that has outgrown its row and can move, and the slots that it may move to."""
        for slot in self._outgrown:
            running = self.running[slot]
            have = len(running.job.token_ids) + len(running.written)
            left = running.limit - len(running.written)
            free = self._rows_for(have + min(left, HEADROOM)) or self._rows_for(have + 1)
            if free and running.can_move:
                return slot, free
        return None

    def _move(self, source: int, target: int) -> None:
        running = self.running.pop(source)
        if self.prefixes is not None:
            self.prefixes.leave(self.batch, source, running.job, running.written)
        _carry(self.batch, running.job, running.written, source, target, running.mask)
        self._note("move", source, target, tuple(running.written), running.mask)
        running.mask = None
        self.running[target] = running
        self._slots[running.job.id] = target
        self._outgrown.remove(source)

    def _take(self, progress: Progress) -> Wrote:
        running, reason = self.running[progress.slot], progress.finish_reason
        running.written += progress.tokens
        if reason == "length" and len(running.written) < running.limit:
            self._outgrown.append(progress.slot)
            reason = None
        if reason:
            self._free(progress.slot, is_sound=reason != "nonfinite")
        return Wrote(running.job.id, progress.tokens, reason, progress.scores)

    def _free(self, slot: int, *, is_sound: bool = True) -> None:
        running = self.running.pop(slot)
        del self._slots[running.job.id]
        if slot in self._outgrown:
            self._outgrown.remove(slot)
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
            self._outgrown.clear()
            if self.prefixes is not None:
                self.prefixes.forget_rows()
            self.batch = self._open_batch()
            self._note("open")
        return failed

    def _note(self, *decision: Any) -> None:
        if self.log is not None:
            self.log.append(decision)


def _limit(job: Job, capacity: int) -> int:
    """New tokens that a job may have in all."""
    return min(job.max_tokens, capacity - len(job.token_ids))


def _first_need(job: Job, capacity: int) -> int:
    """Tokens that a job's first row must hold."""
    return len(job.token_ids) + min(_limit(job, capacity), HEADROOM)


def _put(batch: Batch, job: Job, reuse: Reuse) -> int:
    """Admits a job into the slot that was prepared for it."""
    return batch.admit(
        job.token_ids,
        max_tokens=min(job.max_tokens, batch.room(reuse.slot) - len(job.token_ids)),
        slot=reuse.slot,
        filled=reuse.length,
        mask=job.first_mask,
        sampling=job.sampling,
        stop_ids=job.stop_ids,
        top_logprobs=job.top,
    )


def _carry(
    batch: Batch, job: Job, written: Sequence[int], source: int, target: int, mask: bytes | None
) -> None:
    """Goes on with a job in another row: what was read and written is copied."""
    tokens = [*job.token_ids, *written]
    filled = batch.row_length(source)
    batch.copy_row(source, target, filled)
    batch.free(source)
    left = _limit(job, batch.capacity) - len(written)
    batch.admit(
        tokens,
        max_tokens=min(left, batch.room(target) - len(tokens)),
        slot=target,
        filled=filled,
        written=len(written),
        mask=mask,
        sampling=job.sampling,
        stop_ids=job.stop_ids,
        top_logprobs=job.top,
    )


def replay(log: Sequence[tuple], batch: Batch) -> dict[int, list[int]]:
    """Carries the decisions of a log out on another batch: the tokens of each job id.

    Raises:
      ValueError: the batch gave a job another slot than the log says.
    """
    written: dict[int, list[int]] = {}
    jobs: dict[int, Job] = {}
    for name, *arguments in log:
        if name == "admit":
            job, slot, reuse = arguments
            reuse.repeat(batch)
            if _put(batch, job, reuse) != slot:
                raise ValueError(f"job {job.id} got another slot than {slot}")
            jobs[slot] = job
        elif name == "move":
            source, target, before, mask = arguments
            jobs[target] = jobs.pop(source)
            _carry(batch, jobs[target], before, source, target, mask)
        elif name == "free":
            batch.free(arguments[0])
        elif name == "mask":
            batch.allow(*arguments)
        elif name == "step":
            tokens, prompt_tokens, ahead = arguments
            for progress in batch.step(tokens, prompt_tokens=prompt_tokens, ahead=ahead):
                written.setdefault(jobs[progress.slot].id, []).extend(progress.tokens)
    return written

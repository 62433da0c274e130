"""The engine process: loads the model, then takes turns of the scheduler until its socket is closed.

A thread reads the socket, so that a front that goes away ends this process at once, whatever the device
is doing. Everything else happens in the main thread: commands between two steps, then a step.
"""

import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from qwen3_moe_jax.core.batch import Batch
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.machine import jax_devices, processes, resident
from qwen3_moe_jax.machine.row_plan import RowClass, plan_equal_rows, plan_rows
from qwen3_moe_jax.serve.engine import frames, relay, reports
from qwen3_moe_jax.serve.engine.jobs import Event, Failed, Limits, Wrote
from qwen3_moe_jax.serve.engine.pace import Pace, Stride
from qwen3_moe_jax.serve.engine.prefix import PrefixCache
from qwen3_moe_jax.serve.engine.scheduler import Scheduler

DEFAULT_SLOTS = {"gpu": 32, "cpu": 4}
"""Rows in all, where memory allows so many."""

ONE_KERNEL = 16
"""Rows of one class, where there are several and nobody asks for more slots: a GPU decodes so many in one
kernel, in which company does not change a sequence's bits."""

MAX_STEP = {"gpu": 8, "cpu": 16}
"""Tokens that a dispatch writes for each sequence, at most, while nobody waits."""

STEP_SHARE = {"gpu": 0.3, "cpu": 0.5}
"""Of the time of a mixed step, what a dispatch that only writes may take. A prompt that comes waits for its
end. A GPU is asked for the next one before this one ends, so running answers wait for that and for the
prompt's first chunk; there a short one costs the device nothing."""

CPU_SHARE = 0.5
"""Of the main memory that is free, what slots may take unless asked for more."""


class Engine:
    """A loaded model with its scheduler.

    Attributes:
      reading: seconds of a step that reads so many tokens of prompts, on a GPU.
    """

    def __init__(self, start: frames.Start):
        """Loads the model and opens its slots.

        Raises:
          MemoryPlanError, ModelFileError and what else ``loader.load`` raises.
        """
        from qwen3_moe_jax.api import load

        start = relay.joined_start(start)
        self.model = load(
            start.model,
            backend=start.backend,
            dtype=start.dtype,
            kv_cache=start.kv_cache,
            kernels=start.kernels,
            adapter=start.adapter,
            mesh=start.mesh,
            gate=start.gate,
        )
        self._start = start
        self.programs, self._has_compiled = 0, False
        waited: Callable[[], float] = lambda: 0.0
        self.reading: dict[int, float] = {}
        runner = self.model.runner
        self.rows = self._plan(start)
        self.context = max(row.context for row in self.rows)
        if runner.capabilities.open_batch:
            # prompts are scored and drawn in caches of their own, of any length that the slots have
            runner.set_max_context(self.context)
            from qwen3_moe_jax.jax_backend import programs
            from qwen3_moe_jax.jax_backend.compile_clock import compile_clock

            programs.listen(self._count_program)
            waited = compile_clock().seconds
        limits = Limits(start.max_queue, start.max_queue_tokens)
        self.scheduler = Scheduler(self._open_batch, limits=limits, keep_log=start.keep_log)
        self.has_prefixes = self.has_masks = runner.capabilities.open_batch
        if self.has_prefixes:
            self.scheduler.prefixes = PrefixCache(start.prefix_bytes, chunk=self._chunk)
        if start.warm_up or start.load_programs:
            self.scheduler.batch.load_programs()
        if start.warm_up:
            self._warm_up()
        before = waited()
        self._program_seconds = lambda: waited() - before

    def _count_program(self, name: str, made: Any) -> None:
        """``programs.Listener``; any thread may call it."""
        if made is not None:
            self.programs, self._has_compiled = self.programs + 1, True

    def tidy(self) -> None:
        """After a program was made: gives back what its compiler took."""
        if self._has_compiled:
            self._has_compiled = False
            resident.give_back()

    @property
    def device_kind(self) -> str:
        return self.model.runner.platform

    def _plan(self, start: frames.Start) -> tuple[RowClass, ...]:
        """Rows as asked for, or as memory allows: of several lengths where not all can be the longest."""
        runner, config = self.model.runner, self.model.config
        maximum = config.max_position_embeddings
        context = min(start.context or maximum, maximum)
        slots = start.slots or start.max_slots or DEFAULT_SLOTS[self.device_kind]
        if start.batch_invariant and not start.slots:
            slots = min(slots, ONE_KERNEL)
        if not runner.capabilities.open_batch:
            return (RowClass(1, min(context, runner.max_context)),)
        from qwen3_moe_jax.jax_backend.generate import PREFILL_CHUNKS
        from qwen3_moe_jax.kernels_pallas import CACHE_TILE

        known = [n for n in processes.everyones("free memory", runner.free_nbytes()) if n is not None]
        free = min(known, default=None)
        if free is None:
            return (RowClass(slots, context),)
        share = free * (CPU_SHARE if self.device_kind == "cpu" else 0.9)
        if start.slot_bytes is not None:
            share = min(share, start.slot_bytes)
        positions = int(share // runner.token_nbytes)
        spare = PREFILL_CHUNKS[-1] + CACHE_TILE
        if start.batch_invariant:
            return (plan_equal_rows(positions, start.context, maximum, slots, spare=spare),)
        in_class = None if start.slots else ONE_KERNEL
        return plan_rows(positions, context, slots, spare=spare, in_class=in_class)

    @property
    def _chunk(self) -> int | None:
        """The tokens that prompts are reused by, if bits may not depend on what is in the cache already."""
        if not self._start.batch_invariant:
            return None
        from qwen3_moe_jax.jax_backend.generate import PREFILL_CHUNKS

        return PREFILL_CHUNKS[-1]

    def _open_batch(self) -> Batch:
        runner = self.model.runner
        if runner.capabilities.open_batch:
            from qwen3_moe_jax.serve.engine.pooled import PooledBatch

            batches = [
                runner.open_batch(row.slots, context=row.context, is_invariant=self._start.batch_invariant)
                for row in self.rows
            ]
            return batches[0] if len(batches) == 1 else PooledBatch(batches)
        from qwen3_moe_jax.serve.engine.single import SingleBatch

        return SingleBatch(runner, self.context)

    def _warm_up(self) -> None:
        """Compiles what the first requests need: chunks of prompts, and a step for every number of rows.

        On a GPU all that requests can need: a program takes its compiler longer than hundreds of steps, and
        running answers would wait for it.
        """
        batch, first = self.scheduler.batch, 0
        if self.device_kind == "gpu":
            batch.make_programs()
        for row in self.rows:
            _warm_up_rows(batch, range(first, first + row.slots), row.context - 8)
            if self.device_kind == "gpu":
                self.reading |= _reading_times(batch, range(first, first + row.slots), row.context - 8)
            first += row.slots
        if processes.count() == 1:  # several must run the same programs at the same time
            batch.use_ready_programs()

    def turn(self, *, prompt_tokens: int, max_step: int) -> list[Event]:
        """A turn of the scheduler; arguments as its own.

        Raises:
          RuntimeError: a step failed, and there are other processes: theirs did not, or not in the same way.
        """
        events = self.scheduler.turn(prompt_tokens=prompt_tokens, max_step=max_step)
        failed = next((e for e in events if isinstance(e, Failed) and e.code == "engine"), None)
        if failed is not None and processes.count() > 1:
            raise RuntimeError(f"{failed.message}, in one of {processes.count()} processes")
        return events

    def ready(self) -> frames.Ready:
        """What the front is told."""
        facts = dict(self.model.runner.describe())
        facts["reason"] = self.model.backend_reason
        return frames.Ready(
            context=self.scheduler.batch.capacity,
            slots=self.scheduler.batch.slots,
            rows=[(row.slots, row.context) for row in self.rows],
            backend=str(facts["backend"]),
            has_prefixes=self.has_prefixes,
            has_masks=self.has_masks,
            has_scores=self.model.runner.capabilities.open_batch,
            facts={k: v for k, v in facts.items() if isinstance(v, str | bool | list | dict)},
        )

    def counters(self) -> dict[str, float]:
        """Gauges and counts for the metrics; ``program_seconds``: waited for programs since the load."""
        s, p = self.scheduler, self.scheduler.prefixes
        found: dict[str, float] = {
            "running": len(s.running),
            "queued": len(s.queue),
            "queued_tokens": s.queue.tokens,
            "programs": self.programs,
            "program_seconds": self._program_seconds(),
        }
        if p is not None:
            found |= {
                "prefix_hits": p.hits,
                "prefix_lookups": p.lookups,
                "prefix_reused_tokens": p.reused_tokens,
                "prefix_prompt_tokens": p.prompt_tokens,
                "prefix_store_bytes": p.store_bytes,
            }
        return found

    def score(self, m: frames.Score) -> frames.Scored:
        """Log-probabilities of a text's own tokens."""
        try:
            return self._score(m)
        except Exception as error:
            return frames.Scored(m.id, [], [], f"scoring failed: {type(error).__name__}")

    def _score(self, m: frames.Score) -> frames.Scored:
        runner = self.model.runner
        if not m.top:
            found = runner.log_likelihoods(m.token_ids, first=m.first)
            return frames.Scored(m.id, [float(x) for x in found], [[] for _ in found])
        scores = runner.token_scores(m.token_ids, first=m.first, top=m.top)
        return frames.Scored(m.id, [s.logprob for s in scores], [s.top for s in scores])

    def experts(self, m: frames.Experts) -> frames.Counted:
        """Tokens that chose each expert of each layer."""
        try:
            chosen = self.model.forward(m.token_ids).expert_ids
        except Exception as error:
            return frames.Counted(m.id, [], f"counting experts failed: {type(error).__name__}")
        count = self.model.config.num_experts
        return frames.Counted(m.id, [np.bincount(c.ravel(), minlength=count).tolist() for c in chosen])


def _warm_up_rows(batch: Any, slots: range, room: int) -> None:
    """Of rows of one length."""
    for length in (8, 100, 500):
        if length < room:
            batch.admit([0] * length, max_tokens=4, slot=slots[0])
            while batch.waiting:
                batch.step(1, prompt_tokens=2048)
            batch.step(1)
            batch.free(slots[0])
    if len(slots) == 1:
        return
    from qwen3_moe_jax.jax_backend.step_sizes import row_counts

    for count in row_counts(len(slots)):  # a sequence in the last of so many rows
        batch.admit([0] * min(8, room), max_tokens=4, slot=slots[count - 1])
        while batch.waiting:
            batch.step(1, prompt_tokens=16)
        batch.step(1)
        batch.free(slots[count - 1])


def _reading_times(batch: Any, slots: range, room: int) -> dict[int, float]:
    """Seconds of steps that read 1, 2 and 4 prompts of up to 500 tokens, by tokens: each the second time."""
    found: dict[int, float] = {}
    for count in (1, 1, 2, 2, 4, 4):
        taken = [batch.admit([0] * min(500, room), max_tokens=1, slot=slot) for slot in slots[:count]]
        began = time.perf_counter()
        batch.step(1, prompt_tokens=2048)
        found[batch.read_tokens] = time.perf_counter() - began
        for slot in taken:
            batch.free(slot)
    return found


class Loop:
    """Commands and turns."""

    def __init__(self, engine: Engine, connection: socket.socket, inbox: "queue.SimpleQueue", step_ms: float):
        self._engine, self._connection, self._inbox = engine, connection, inbox
        self._pace = Pace(step_ms / 1000)
        for tokens, seconds in engine.reading.items():
            self._pace.took(tokens, seconds, is_decoding=False)
        kind = engine.device_kind
        self._stride = Stride(step_ms / 1000 * STEP_SHARE[kind], MAX_STEP[kind])
        self._events: list[Event] = []
        self._asides: list[frames.Score | frames.Experts] = []
        self._last = (0, 0)
        self._since = 0.0  # when the turn before ended, or this loop had nothing to do

    def run(self) -> None:
        """Until the process ends."""
        while True:
            self.go_on()

    def go_on(self) -> None:
        """Commands, for which it waits if there is nothing else, and a turn."""
        scheduler = self._engine.scheduler
        can_turn = scheduler.has_work and not scheduler.is_held
        is_idle = not (can_turn or self._asides or self._events)
        self._drain(wait=is_idle)
        if self._asides:  # one between two steps
            self._aside(self._asides.pop(0))
            is_idle = True
        if is_idle:
            self._since = time.perf_counter()
        if scheduler.has_work and not scheduler.is_held:
            self._turn(scheduler)
        self._report()

    def _drain(self, *, wait: bool) -> None:
        while True:
            try:
                self._command(self._inbox.get(block=wait))
            except queue.Empty:
                return
            wait = False

    def _command(self, m: frames.ToEngine) -> None:
        scheduler = self._engine.scheduler
        if isinstance(m, frames.Submit | frames.Cancel | frames.Allow):
            relay.tell(m)
        if isinstance(m, frames.Submit):
            self._events += scheduler.submit(reports.job_of(m))
        elif isinstance(m, frames.Cancel):
            scheduler.cancel(m.id)
            self._asides = [a for a in self._asides if a.id != m.id]
        elif isinstance(m, frames.Allow):
            scheduler.allow(m.id, m.mask)
        elif isinstance(m, frames.Score | frames.Experts):
            self._asides.append(m)

    def _aside(self, m: "frames.Score | frames.Experts") -> None:
        relay.tell(m)
        answer = self._engine.score(m) if isinstance(m, frames.Score) else self._engine.experts(m)
        frames.send(self._connection, answer)

    def _turn(self, scheduler: Scheduler) -> None:
        """Takes a turn, and tells the pace how long running answers waited for it: since the turn before, for
        a GPU may end what that one had begun."""
        mixed, programs, running = scheduler.is_decoding, self._engine.programs, len(scheduler.running)
        count = self._pace.prompt_tokens(is_decoding=mixed, waiting=scheduler.waiting_prompts)
        turn = relay.Turn(count, self._stride.tokens(running))
        relay.tell(turn)
        events = self._engine.turn(prompt_tokens=turn.prompt_tokens, max_step=turn.max_step)
        began, self._since = self._since, time.perf_counter()
        seconds, read = self._since - began, scheduler.batch.read_tokens
        self._events += events
        if self._engine.programs != programs:
            self._engine.tidy()  # and what it took to make a program says nothing of the next step
        elif read:
            self._pace.took(read, seconds, is_decoding=mixed)
        elif wrote := [len(e.tokens) for e in events if isinstance(e, Wrote)]:
            self._stride.took(running, max(1, *wrote), seconds)

    def _report(self) -> None:
        scheduler = self._engine.scheduler
        now = (len(scheduler.running), len(scheduler.queue))
        if not self._events and now == self._last:
            return
        self._last = now
        report = reports.progress_of(self._events, self._engine.counters())
        self._events = []
        frames.send(self._connection, report)


def _read_forever(connection: socket.socket, inbox: "queue.SimpleQueue") -> None:
    """Fills the inbox; when the front has gone, so does this process."""
    while (message := frames.receive(connection)) is not None:
        inbox.put(message)
    processes.say_goodbye()
    os._exit(0)


def _explain(error: BaseException) -> tuple[str, int]:
    """One line and the exit code that the command line gives such an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text, 3 if isinstance(error, MemoryPlanError | MemoryError) else 1


def main(file_number: int) -> None:
    """Runs the engine on an inherited socket."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the front decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=file_number)
    start = frames.receive(connection)
    assert isinstance(start, frames.Start), "the front's first message says what to load"
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_read_forever, args=(connection, inbox), daemon=True).start()
    jax_devices.take_card()
    processes.react(on_loss=partial(_tell_front, connection))
    try:
        engine = Engine(start)
        frames.send(connection, engine.ready())
        Loop(engine, connection, inbox, start.step_ms).run()
    except BaseException as error:
        if os.environ.get("QWEN3_MOE_DEBUG"):
            traceback.print_exc()
        processes.await_news(error)
        text, code = _explain(error)
        frames.send(connection, frames.Broken(text, code))
        processes.leave(code, text)
        processes.end(code)
        raise SystemExit(1) from error


def _tell_front(connection: socket.socket, line: str, code: int) -> None:
    """Another process of this engine has gone: the front says so, and this process ends."""
    with suppress(OSError):
        frames.send(connection, frames.Broken(line, code))
    os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))

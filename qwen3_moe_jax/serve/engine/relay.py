"""One engine in several processes: process 0 says what it does, and the others do the same.

The scheduler knows no clock: what it is told, and what the batch answers, decide all that it does. So each
process has a scheduler of its own, is told the same commands and turns in the same order, and its batch gets
the same tokens, for what a step gives is whole on every device. Nothing is asked back.
"""

import os
from typing import TYPE_CHECKING, NoReturn

import msgspec

from qwen3_moe_jax.core import speaker
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.machine import jax_devices, processes
from qwen3_moe_jax.machine.processes import Processes
from qwen3_moe_jax.serve.engine import frames, reports

if TYPE_CHECKING:
    from qwen3_moe_jax.serve.engine.worker import Engine


class Turn(msgspec.Struct, tag=True):
    """A turn of the scheduler; fields as ``Scheduler.turn``."""

    prompt_tokens: int
    max_step: int


Work = frames.Submit | frames.Cancel | frames.Allow | frames.Score | frames.Experts | Turn

NAME = "work"

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Work)
_start = msgspec.msgpack.Decoder(frames.Start)


def tell(work: Work) -> None:
    """Says to the other processes, where there are some, what this one is about to do."""
    peers = processes.joined()
    if peers is not None:
        peers.from_first(NAME, _encoder.encode(work))


def joined_start(start: frames.Start) -> frames.Start:
    """Joins the other processes, if ``start`` names some; what is to be loaded is what process 0 says.

    Raises:
      OptionError, BackendUnavailableError: as ``processes.join``.
    """
    if start.processes is None:
        return start
    speaker.keep_output()
    coordinator, count, index, seconds = start.processes
    processes.join(Processes(coordinator, count, index, seconds))
    peers = processes.joined()
    if peers is None:
        return start
    first = _start.decode(peers.from_first("what is loaded", _encoder.encode(start)))
    return msgspec.structs.replace(first, model=start.model, processes=start.processes)


def check(start: frames.Start, replicas: int = 1) -> None:
    """Raises OptionError for what one engine in several processes does not have."""
    if start.processes is None:
        return
    if replicas > 1:
        raise OptionError("--replicas are engines of one host: leave it out with --coordinator")
    if start.prefix_bytes:
        raise OptionError(
            "--cache-ram keeps whole rows, and each process has a part of them: leave it out with "
            "--coordinator (rows on the devices are used again as ever)"
        )


def follow(start: frames.Start) -> NoReturn:
    """What every process but process 0 does: loads its part, and does what it is told.

    When process 0 ends rightly, so does this one, at once: JAX's service has gone.

    Raises:
      OptionError, ModelFileError, MemoryPlanError: as the engine of process 0.
    """
    from qwen3_moe_jax.serve.engine.worker import Engine

    jax_devices.take_card()
    processes.react(on_end=lambda: os._exit(ExitCode.DONE))
    engine = Engine(start)
    peers = processes.joined()
    assert peers is not None, "the engine has joined the others"
    while True:
        carry_out(engine, _decoder.decode(peers.from_first(NAME)))


def carry_out(engine: "Engine", work: Work) -> None:
    """Does what process 0 does, and says nothing."""
    scheduler = engine.scheduler
    if isinstance(work, Turn):
        engine.turn(prompt_tokens=work.prompt_tokens, max_step=work.max_step)
        engine.tidy()
    elif isinstance(work, frames.Submit):
        scheduler.submit(reports.job_of(work))
    elif isinstance(work, frames.Cancel):
        scheduler.cancel(work.id)
    elif isinstance(work, frames.Allow):
        scheduler.allow(work.id, work.mask)
    elif isinstance(work, frames.Score):
        engine.score(work)
    else:
        engine.experts(work)

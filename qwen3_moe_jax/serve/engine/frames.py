"""What front and engine say to each other: msgpack frames over a socket pair, each after its length.

Every message is a tagged struct of plain values, so neither side can make the other run code.
"""

import asyncio
import socket
import struct
from typing import Any

import msgspec

from qwen3_moe_jax.core.sampling import Sampling

MAX_FRAME = 256 << 20
"""Bytes of a frame: far above the largest prompt; a longer one is a fault of the other side."""

_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, tag=True):
    """Front to engine, first: what to load. Fields as ``loader.load`` and the serve command; without
    ``slots``, ``max_slots`` or fewer are opened, as memory allows; where several engines share main memory,
    ``slot_bytes`` of it are for them. ``warm_up`` makes programs that first requests need; ``load_programs``
    only loads those that are on disk. ``processes``: what ``Processes`` has."""

    model: str | None
    backend: str = "auto"
    dtype: str | None = None
    kv_cache: str | None = None
    kernels: str = "auto"
    adapter: str | None = None
    mesh: str | None = None
    gate: bool = True
    context: int | None = None
    slots: int | None = None
    max_slots: int | None = None
    max_queue: int = 256
    max_queue_tokens: int = 1 << 20
    prefix_bytes: int = 0
    slot_bytes: int | None = None
    batch_invariant: bool = False
    step_ms: float = 50.0
    warm_up: bool = True
    load_programs: bool = False
    keep_log: bool = False
    processes: tuple[str, int, int, float] | None = None


class Submit(msgspec.Struct, tag=True):
    """Front to engine: one sequence to write; fields as ``scheduler.Job``."""

    id: int
    key: str
    token_ids: list[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: list[int]
    scope: str | None = None
    is_resumed: bool = False
    first_mask: bytes | None = None
    top: int | None = None


class Cancel(msgspec.Struct, tag=True):
    """Front to engine: nobody waits for this job any more."""

    id: int


class Allow(msgspec.Struct, tag=True):
    """Front to engine: the tokens that a masked job may write next, as bits."""

    id: int
    mask: bytes


class Score(msgspec.Struct, tag=True):
    """Front to engine: log-probabilities of a text's own tokens from ``first`` on, with ``top`` rivals."""

    id: int
    token_ids: list[int]
    first: int = 1
    top: int = 0


class Experts(msgspec.Struct, tag=True):
    """Front to engine: how often the experts of every layer are chosen in a text."""

    id: int
    token_ids: list[int]


class Ready(msgspec.Struct, tag=True):
    """Engine to front, once: it can be asked. ``rows``: how many there are of each length; ``facts`` are for
    people; the rest as ``Start``."""

    context: int
    slots: int
    rows: list[tuple[int, int]]
    backend: str
    has_prefixes: bool
    has_masks: bool
    has_scores: bool
    facts: dict[str, Any]


class Broken(msgspec.Struct, tag=True):
    """Engine to front: it cannot start, in one line."""

    message: str
    code: int = 1


class Progress(msgspec.Struct, tag=True):
    """Engine to front, one for each turn: [id, cached] of jobs that began, [id, tokens, finish reason] of
    those that went on, [id, code, message] of those that failed; counters (``worker.counters``); and
    [id, [log-probability, [id, log-probability] of rivals] of each token] where they were asked for."""

    began: list[tuple[int, int]]
    wrote: list[tuple[int, list[int], str | None]]
    failed: list[tuple[int, str, str]]
    counters: dict[str, float]
    scored: list[tuple[int, list[tuple[float, list[tuple[int, float]]]]]] = []


class Scored(msgspec.Struct, tag=True):
    """Engine to front: of each token from ``first`` on its log-probability, and [id, log-probability] of
    the likeliest; or, if ``error`` is not empty, why not."""

    id: int
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    error: str = ""


class Counted(msgspec.Struct, tag=True):
    """Engine to front: tokens that chose each expert, layer by expert; or why not."""

    id: int
    counts: list[list[int]]
    error: str = ""


ToEngine = Start | Submit | Cancel | Allow | Score | Experts
ToFront = Ready | Broken | Progress | Scored | Counted

_encoder = msgspec.msgpack.Encoder()
_decoders = {
    "engine": msgspec.msgpack.Decoder(ToEngine),
    "front": msgspec.msgpack.Decoder(ToFront),
}


def pack(message: msgspec.Struct) -> bytes:
    """The frame of a message."""
    return with_length(_encoder.encode(message))


def with_length(body: bytes) -> bytes:
    """A body after its length."""
    return _LENGTH.pack(len(body)) + body


def send(connection: socket.socket, message: msgspec.Struct) -> None:
    """Writes a frame; waits until the other side takes it."""
    connection.sendall(pack(message))


def receive(connection: socket.socket) -> "ToEngine | None":
    """The next message for the engine; None at the end of the stream.

    Raises:
      ValueError: what came is no frame.
    """
    body = read_frame(connection)
    return None if body is None else _decoders["engine"].decode(body)


def read_frame(connection: socket.socket) -> bytes | None:
    """The next body; None at the end of the stream.

    Raises:
      ValueError: what came is no frame.
    """
    head = _read(connection, _LENGTH.size)
    return None if head is None else _read(connection, _checked(head))


async def receive_async(reader: asyncio.StreamReader) -> "ToFront | None":
    """The next message for the front; None at the end of the stream."""
    body = await read_frame_async(reader)
    return None if body is None else _decoders["front"].decode(body)


async def read_frame_async(reader: asyncio.StreamReader) -> bytes | None:
    """The next body; None at the end of the stream."""
    try:
        head = await reader.readexactly(_LENGTH.size)
        return await reader.readexactly(_checked(head))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _checked(head: bytes) -> int:
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    return length


def _read(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = connection.recv(min(count - len(parts), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)

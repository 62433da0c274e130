"""What the processes of one model say to each other: frames over TCP, between process 0 and each other one.

A frame is its length, a byte that says its kind, and a body. A process that has gone closes its connection;
one whose host has gone, or that hangs, is silent. Either ends this process: in a collective operation it
would wait for the other one for ever.
"""

import json
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode

PING_SECONDS = 2.0
"""Between two signs of life."""

SILENT_SECONDS = 20.0
"""A process of which nothing was heard for so long has gone."""

GRACE_SECONDS = 3.0
"""After another process has failed, this one may end by itself for so long: most faults are everybody's."""

MAX_FRAME = 1 << 30
"""Bytes of a frame; a longer one is a fault of the other side."""

PING, VALUE, END = b"p", b"v", b"e"

_HEAD = struct.Struct("<Ic")


class PeersEndedError(RuntimeError):
    """Another process has ended, rightly, while this one waits for it."""


def send_frame(connection: socket.socket, kind: bytes, body: bytes = b"") -> None:
    """Writes a frame.

    Raises:
      OSError: the other side has gone, or takes nothing.
    """
    connection.sendall(_HEAD.pack(len(body), kind) + body)


def read_frame(connection: socket.socket) -> tuple[bytes, bytes]:
    """The next frame: its kind and its body.

    Raises:
      EOFError: the other side has gone.
      OSError, ValueError: nothing comes; what came is no frame.
    """
    length, kind = _HEAD.unpack(_read(connection, _HEAD.size))
    if length > MAX_FRAME:
        raise ValueError(f"a frame of {length} bytes")
    return kind, _read(connection, length)


def _read(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def end_process(line: str, code: int) -> NoReturn:
    """Says why, and ends this process at once: its main thread may wait inside a collective operation."""
    terminal.error(line)
    os._exit(code)


class Peers:
    """The other processes, as one of them sees them: process 0 has a connection to each, others to process 0.

    One thread at a time may call ``everyones`` and ``from_first``, and every process calls them in the same
    order. A name says what is exchanged: another name than the other process' is a fault of the program.

    Attributes:
      index: of this process.
      count: of all processes.
      on_loss: what to do when another one has gone or failed: given a line and an exit code.
      on_end: what to do when another one has ended rightly; None is nothing. A thread of its own calls both.
    """

    def __init__(self, index: int, count: int, connections: Mapping[int, socket.socket]):
        """``connections``: by the other process' number; they are this object's from now on."""
        self.index, self.count = index, count
        self.on_loss: Callable[[str, int], object] = end_process
        self.on_end: Callable[[], object] | None = None
        self._connections = dict(connections)
        self._locks = {peer: threading.Lock() for peer in connections}
        self._inbox: dict[int, queue.SimpleQueue[bytes | None]] = {
            p: queue.SimpleQueue() for p in connections
        }
        self._ended: set[int] = set()
        self._news = threading.Condition()
        self._has_left = False
        self._is_over = threading.Event()
        for peer, connection in self._connections.items():
            connection.settimeout(SILENT_SECONDS)
            _set_no_delay(connection)
            threading.Thread(target=self._listen, args=(peer,), name="peer", daemon=True).start()
        threading.Thread(target=self._ping, name="ping", daemon=True).start()

    def everyones(self, name: str, value: Any) -> list[Any]:
        """A value of each process, plain data as JSON has it, in their order; the same list everywhere.

        Raises:
          PeersEndedError: another process has ended.
        """
        return [json.loads(part) for part in self.everyones_bytes(name, json.dumps(value).encode())]

    def everyones_bytes(self, name: str, value: bytes) -> list[bytes]:
        """The same of bytes."""
        if self.index:
            self._send(0, VALUE, _named(name, value))
            return _split(self._next(0, name))
        others = [self._next(peer, name) for peer in range(1, self.count)]
        found = [value, *others]
        for peer in range(1, self.count):
            self._send(peer, VALUE, _named(name, _joined(found)))
        return found

    def from_first(self, name: str, value: bytes = b"") -> bytes:
        """What process 0 gives; the others' values do not matter. It waits for nobody.

        Raises:
          PeersEndedError: process 0 has ended.
        """
        if self.index:
            return self._next(0, name)
        for peer in self._connections:
            self._send(peer, VALUE, _named(name, value))
        return value

    def leave(self, code: int = ExitCode.DONE, line: str = "") -> None:
        """Says to the others that this process ends, and how; they end too unless ``code`` is 0."""
        if self._has_left:
            return
        self._has_left = True
        for peer in self._connections:
            self._send(peer, END, json.dumps([int(code), line, False]).encode())

    def wait_for_others(self, seconds: float) -> None:
        """Returns when the others have ended, or after so long."""
        with self._news:
            self._news.wait_for(lambda: len(self._ended) == len(self._connections), seconds)

    def close(self) -> None:
        """Ends the connections; nobody watches any more."""
        self._has_left = True
        self._is_over.set()
        for connection in self._connections.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _next(self, peer: int, name: str) -> bytes:
        body = self._inbox[peer].get()
        if body is None:
            self._inbox[peer].put(None)
            raise PeersEndedError(f"process {peer} has ended, and process {self.index} waits for its {name}")
        found, _, value = body.partition(b"\0")
        if found.decode() != name:
            raise RuntimeError(
                f"process {peer} is at {found.decode()}, process {self.index} at {name}: "
                "all processes have to do the same"
            )
        return value

    def _send(self, peer: int, kind: bytes, body: bytes = b"") -> None:
        """A connection that is broken is the listening thread's to tell."""
        with self._locks[peer], suppress(OSError):
            send_frame(self._connections[peer], kind, body)

    def _ping(self) -> None:
        while not self._is_over.wait(PING_SECONDS):
            for peer in self._connections:
                self._send(peer, PING)

    def _listen(self, peer: int) -> None:
        try:
            while True:
                kind, body = read_frame(self._connections[peer])
                if kind == VALUE:
                    self._inbox[peer].put(body)
                elif kind == END:
                    code, line, is_relayed = json.loads(body)
                    self._has_ended(peer, code, line, is_relayed=is_relayed)
        except TimeoutError:
            self._lost(peer, f"was silent for {SILENT_SECONDS:.0f} s")
        except (EOFError, OSError, ValueError):
            self._lost(peer, "has ended without a word")

    def _note_end(self, peer: int) -> None:
        with self._news:
            self._ended.add(peer)
            self._news.notify_all()

    def _has_ended(self, peer: int, code: int, line: str, *, is_relayed: bool) -> None:
        self._note_end(peer)
        if not code:
            self._inbox[peer].put(None)  # whoever waits for it waits in vain; after a fault ``_end`` is next
            if self.on_end is not None:
                self.on_end()
        if not code or self._has_left:
            return
        if not is_relayed:
            why = f": {line}" if line else ""
            line = f"process {peer} of {self.count} ended with exit code {code}{why}"
            time.sleep(GRACE_SECONDS)
        self._end(peer, line, code)

    def _lost(self, peer: int, what: str) -> None:
        is_known = peer in self._ended or self._has_left
        self._note_end(peer)
        if not is_known:
            self._end(peer, f"process {peer} of {self.count} {what}: this process ends too", ExitCode.FAULT)

    def _end(self, peer: int, line: str, code: int) -> None:
        """Ends this process, and those that have no connection to the one that has gone."""
        with self._news:
            if self._is_over.is_set():
                return
            self._is_over.set()
        for other in self._connections:
            if other != peer:
                self._send(other, END, json.dumps([int(code), line, True]).encode())
        self.on_loss(line, int(code))


def _set_no_delay(connection: socket.socket) -> None:
    """A step waits for a frame of few bytes."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _named(name: str, value: bytes) -> bytes:
    return name.encode() + b"\0" + value


def _joined(parts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def _split(body: bytes) -> list[bytes]:
    parts: list[bytes] = []
    at = 0
    while at < len(body):
        (length,) = struct.unpack_from("<I", body, at)
        parts.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    return parts


def check_same(peers: Peers, facts: Mapping[str, object], *, what: str) -> None:
    """Compares facts of all processes.

    Args:
      peers: the other processes.
      facts: by name, which is a text for people.
      what: what the exchange is called.

    Raises:
      OptionError: they are not the same; names the first that differs, everywhere in the same words.
    """
    mine = {name: str(value) for name, value in facts.items()}
    first, *others = peers.everyones(what, mine)
    for number, other in enumerate(others, 1):
        if (line := difference(first, number, other)) is not None:
            raise OptionError(line)


def difference(first: Mapping[str, str], number: int, other: Mapping[str, str]) -> str | None:
    """The first fact in which a process is not as process 0; None where all are the same."""
    for name, value in first.items():
        if other.get(name) != value:
            return (
                f"process {number} has another {name} than process 0 ({other.get(name, 'none')}, {value}): "
                "every process needs the same"
            )
    return None

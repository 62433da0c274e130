"""Compiles grammars and computes their masks in processes that may be killed; started by ``grammar``.

A schema comes from a client, and compiling it can burn time and memory inside one call that nothing can
interrupt. So this process, which holds the vocabulary, only forks: one child for each grammar, with a socket
of its own. The kernel ends a child that uses more CPU time than it may (``setitimer`` with the default
action) or asks for too much memory, and no other answer notices. A child ends when its socket is closed.

Messages are msgpack after their length, as between front and engine (``engine.frames``).
"""

import contextlib
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from qwen3_moe_jax.serve.engine.frames import read_frame, with_length
from qwen3_moe_jax.serve.text_model import TextModel

if TYPE_CHECKING:
    import llguidance

MEMORY_BYTES = 512 << 20
"""A child may take so much beside what it was born with."""

ANY_TOKENS = '%llguidance {"no_forcing": true}'
"""Head of a grammar in which any tokens may spell what must come."""

MASK_SECONDS = 0.5
"""CPU time of one mask."""


class Compile(msgspec.Struct, tag=True):
    """Front to child, first: a source, its kind ("json" or "lark"), the CPU time that it has.

    ``canonical``: where only one text may come, only the tokens that the tokenizer would take for it may.
    """

    kind: str
    source: str
    seconds: float
    canonical: bool = True


class Take(msgspec.Struct, tag=True):
    """Front to child: ``copy`` of the grammar goes on after these tokens; a new copy is at the beginning."""

    copy: int
    tokens: list[int]


class Mask(msgspec.Struct, tag=True):
    """Child to front: bits of the tokens that may come; ``is_over``: nothing has to; or what is wrong."""

    bits: bytes = b""
    is_over: bool = False
    error: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Compile | Take).decode


class _Vocabulary:
    """The tokenizer as llguidance wants it."""

    def __init__(self, model: TextModel):
        t = model.tokenizer
        self.eos_token_id = t.eos_id if t.eos_id is not None else min(t.stop_ids)
        self.bos_token_id = t.bos_id
        ids = range(model.vocab_size)
        self.tokens = [t.token_bytes(i) for i in ids]
        special = [i for i in ids if not self.tokens[i] or i in t.stop_ids]
        for i in special:
            self.tokens[i] = t.token_bytes(i, show_control=True) or f"<|unused_{i}|>".encode()
        self.special_token_ids = special
        self._encode = t.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def make_tokenizer(model: TextModel) -> "llguidance.LLTokenizer":
    """llguidance's view of a model's vocabulary: about a second for 151,936 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    stops = sorted(model.tokenizer.stop_ids)
    return LLTokenizer(TokenizerWrapper(_Vocabulary(model)), n_vocab=model.vocab_size, eos_token=stops)


def one_line(error: object) -> str:
    """An error of llguidance for a client."""
    return " ".join(str(error).split())[:300] or "the schema is not valid"


def compile_grammar(
    tokenizer: "llguidance.LLTokenizer", kind: str, source: str, *, canonical: bool = True
) -> "llguidance.LLMatcher":
    """A matcher at its beginning; ``kind``, ``source`` and ``canonical`` as ``Compile``.

    Raises:
      ValueError: the source cannot be used; the text says why.
    """
    from llguidance import LLMatcher, LLParserLimits

    if not canonical:
        rules = f"start: %json {source}" if kind == "json" else source
        kind, source = "lark", f"{ANY_TOKENS}\n{rules}"
    make: Any = {"json": LLMatcher.grammar_from_json_schema, "lark": LLMatcher.grammar_from_lark}[kind]
    limits = LLParserLimits(max_grammar_size=200_000, max_lexer_states=50_000, verbose_errors=False)
    try:
        matcher = LLMatcher(tokenizer, make(source), log_level=0, limits=limits)
    except (ValueError, RecursionError) as error:
        raise ValueError(one_line(error)) from None
    if matcher.is_error():
        raise ValueError(one_line(matcher.get_error()))
    return matcher


def mask_of(matcher: "llguidance.LLMatcher") -> Mask:
    """What may come next."""
    bits = matcher.compute_bitmask()
    if matcher.is_error():
        return Mask(error="the schema is too complex for this answer")
    return Mask(bytes(bits), matcher.is_stopped() or matcher.is_accepting())


@contextlib.contextmanager
def _cpu_seconds(seconds: float):
    """Ends this process once the block has used so much CPU time."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_process() -> None:
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    for name, value in (("RLIMIT_AS", now + MEMORY_BYTES), ("RLIMIT_CORE", 0), ("RLIMIT_FSIZE", 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def serve_one(connection: socket.socket, tokenizer: "llguidance.LLTokenizer") -> None:
    """One grammar, until the front closes the connection."""
    first = _receive(connection)
    if not isinstance(first, Compile):
        return
    try:
        with _cpu_seconds(first.seconds):
            pristine = compile_grammar(tokenizer, first.kind, first.source, canonical=first.canonical)
            answer = mask_of(pristine)
    except (ValueError, MemoryError) as error:
        connection.sendall(with_length(_encode(Mask(error=one_line(error)))))
        return
    connection.sendall(with_length(_encode(answer)))
    copies: dict[int, llguidance.LLMatcher] = {}
    while isinstance(message := _receive(connection), Take):
        with _cpu_seconds(MASK_SECONDS):
            matcher = copies.get(message.copy) or pristine.deep_copy()
            copies[message.copy] = matcher
            for token in message.tokens:
                matcher.consume_token(token)
            answer = mask_of(matcher)
        connection.sendall(with_length(_encode(answer)))


def _receive(connection: socket.socket) -> Compile | Take | None:
    body = read_frame(connection)
    return None if body is None else _decode(body)


def main(file_number: int, model: str) -> None:
    """Forks a child for each socket that comes over the inherited one, until that is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the front decides when this process ends
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave nothing behind
    control = socket.socket(fileno=file_number)
    tokenizer = make_tokenizer(TextModel(model))
    compile_grammar(tokenizer, "json", "{}")  # what is made once is made before the first fork
    control.sendall(b"r")
    while True:
        data, files, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        connection = socket.socket(fileno=files[0])
        if os.fork() == 0:
            control.close()
            _limit_process()
            with contextlib.suppress(OSError):
                serve_one(connection, tokenizer)
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

"""Token ids, as they come from a runner, to text: whole characters, stop strings, reasoning set apart.

Text is held back only as long as what follows can change its meaning: half a
character, the beginning of a stop string, the beginning of a ``</think>``.
"""

import atexit
import contextlib
import re
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen3_moe_jax.core.arguments import check_list
from qwen3_moe_jax.core.lookup import Drafts
from qwen3_moe_jax.text.tokenizer import StreamDecoder, Tokenizer

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """A piece of an answer; ``reasoning`` is what a model writes between <think> and </think>."""

    kind: Literal["reasoning", "content"]
    text: str


class TextStream:
    """The text of one generation; iterate once, over strings or, with ``pieces``, over typed ones.

    Attributes:
      finish_reason: "stop" (an end token or a stop string), "length" (max_tokens), or None
        before the end.
      stop_string: the stop string that ended the text, or None.
      prompt_tokens: tokens of the prompt.
      tokens: ids generated so far, without an end token.
      notes: what the user should know of how the prompt was made, one line each.
      seed: of the random stream, or None where that is not known.
      drafts: what became of the drafts of prompt lookup so far, or None without it.
      on_first_token: called when the first token is there, which may have no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        token_ids: Iterable[int],
        *,
        stop: Sequence[str] | None = (),
        max_tokens: int | None = None,
        prompt_tokens: int = 0,
        starts_in_reasoning: bool = False,
        notes: Sequence[str] = (),
        seed: int | None = None,
        drafts: Drafts | None = None,
    ):
        """Prepares; the first token is computed when iteration starts.

        Args:
          tokenizer: of the model that generates.
          token_ids: new tokens, without the end token (``Runner.stream``).
          stop: strings that end the text; they are not part of it.
          max_tokens: what the runner was asked for, the context's room included: tells
            "length" from "stop".
          prompt_tokens: for the counts.
          starts_in_reasoning: the prompt left a <think> open.
          notes: of the rendered chat.
          seed, drafts: for the attributes.

        Raises:
          ValueError: a stop string is empty or no string.
        """
        self.finish_reason: Literal["stop", "length"] | None = None
        self.prompt_tokens = prompt_tokens
        self.notes, self.seed, self.drafts = tuple(notes), seed, drafts
        self.tokens: list[int] = []
        self._decoder = StreamDecoder(tokenizer)
        self._token_ids = iter(token_ids)
        # Bound now: while the interpreter ends, this module's names are gone before its generators are.
        self._end = self._token_ids.close if isinstance(self._token_ids, Generator) else None
        self._stops = StopStrings(stop)
        self._max_tokens = max_tokens
        self._starts_in_reasoning = starts_in_reasoning
        self.on_first_token: Callable[[], None] | None = None
        self._fault: Exception | None = None
        _STREAMS.add(self)

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far; an end token is not counted."""
        return len(self.tokens)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stops.found

    def __iter__(self) -> Iterator[str]:
        """Pieces of text, none of them empty."""
        if self._fault is not None:
            raise self._fault
        try:
            for token_id in self._token_ids:
                if not self.tokens and self.on_first_token is not None:
                    self.on_first_token()
                self.tokens.append(token_id)
                yield from self._emit(self._decoder.push(token_id))
                if self.finish_reason:
                    return
            yield from self._emit(self._decoder.finish(), is_last=True)
            if not self.finish_reason:
                self.finish_reason = "length" if self.new_tokens == self._max_tokens else "stop"
        except Exception as error:
            self._fault = error  # whoever reads on must not take it for the end
            raise
        finally:
            self.close()

    def pieces(self) -> Iterator[Piece]:
        """Pieces that say whether they are reasoning or content; the tags themselves are left out."""
        splitter = ReasoningSplitter(starts_in_reasoning=self._starts_in_reasoning)
        for text in self:
            yield from splitter.push(text)
        yield from splitter.finish()

    def _emit(self, text: str, *, is_last: bool = False) -> Iterator[str]:
        text = self._stops.push(text)
        if self._stops.found is not None:
            self.finish_reason = "stop"
        elif is_last:
            text += self._stops.finish()
        if text:
            yield text

    def close(self) -> None:
        """Ends the generation, so that the runner gets back what it lent; again is no harm."""
        if self._end is not None:
            self._end()


_STREAMS: weakref.WeakSet[TextStream] = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Ends the generations that were left unfinished, while the modules that they need are still there."""
    for stream in list(_STREAMS):
        with contextlib.suppress(ValueError):  # a thread is in it
            stream.close()


def stop_texts(stop: Iterable[str] | None) -> tuple[str, ...]:
    """The stop strings that an argument names: one, several, or None for none.

    Raises:
      KindError, ValueError: what cannot end a text.
    """
    texts = (stop,) if isinstance(stop, str) else check_list("stop", () if stop is None else stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"a stop string must be a text of at least one character, not {text!r}")
    return texts


class StopStrings:
    """Cuts a text, as it comes, before the stop string that is complete first.

    Where the pieces are cut makes no difference to the result.

    Attributes:
      found: the stop string that was met, or None.
    """

    def __init__(self, stop: Sequence[str] | None = ()):
        self._stops = stop_texts(stop)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe to show now; none any more once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def without_end(self, text: str) -> str | None:
        """What is held back and this text; None if ``push`` would find a stop string there."""
        text = self._held + text
        return None if any(stop in text for stop in self._stops) else text

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


class ReasoningSplitter:
    """Tells reasoning from content as text comes.

    Reasoning is what stands in a <think>...</think> that opens the answer (or that the
    prompt has opened already); the newlines around it belong to the tags. Tags anywhere
    else are content.
    """

    def __init__(self, *, starts_in_reasoning: bool = False):
        self._kind_without_tag: Literal["reasoning", "content"] = (
            "reasoning" if starts_in_reasoning else "content"
        )
        self._state: Literal["start", "reasoning", "content"] = "start"
        self._held = ""
        self._strip_newlines = False

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._state == "reasoning" or (
            self._state == "start" and self._kind_without_tag == "reasoning"
        )

    @property
    def has_begun(self) -> bool:
        """Whether it is known how the answer begins."""
        return self._state != "start"

    def stays_in(self, text: str) -> bool:
        """Whether ``push`` of this text would leave what it is in: thinking, or content."""
        if self._state == "reasoning":
            return END_THINK not in self._held + text
        return self._state == "content"

    def push(self, text: str) -> list[Piece]:
        """The pieces that this text completes."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._start(pieces)
        if self._state == "reasoning":
            self._reason(pieces)
        if self._state == "content":
            self._take(pieces, "content", len(self._held))
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back when the answer ended."""
        pieces: list[Piece] = []
        kind = self._kind_without_tag if self._state == "start" else self._state
        self._take(pieces, kind, len(self._held))
        return pieces

    def _start(self, pieces: list[Piece]) -> None:
        head = self._held.lstrip()
        if head.startswith(THINK):
            self._held = head[len(THINK) :]
            self._state, self._strip_newlines = "reasoning", True
        elif not THINK.startswith(head):
            self._state = self._kind_without_tag
            self._strip_newlines = self._state == "reasoning"

    def _reason(self, pieces: list[Piece]) -> None:
        end = self._held.find(END_THINK)
        if end < 0:
            tail = re.search(r"\n*\Z", self._held[: len(self._held) - _overlap(self._held, END_THINK)])
            assert tail is not None, "the pattern matches the empty end too"
            self._take(pieces, "reasoning", tail.start())
            return
        rest = self._held[end + len(END_THINK) :]
        self._held = self._held[:end].rstrip("\n")
        self._take(pieces, "reasoning", len(self._held))
        self._held, self._state, self._strip_newlines = rest, "content", True

    def _take(self, pieces: list[Piece], kind: Literal["reasoning", "content"], count: int) -> None:
        """Moves the first ``count`` held characters into a piece."""
        text, self._held = self._held[:count], self._held[count:]
        if self._strip_newlines:
            text = text.lstrip("\n")
            self._strip_newlines = not text
        if text:
            pieces.append(Piece(kind, text))


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of ``text`` begin ``word`` without completing it."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)

"""A conversation: its turns, what of them the model is sent, and its files."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3_moe_jax.core.input_file import read_text
from qwen3_moe_jax.core.output_file import open_output

Message = dict[str, str]

MIN_ROOM = 8
"""The context is full when a prompt leaves less than this part of it (1/8) for the answer."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer; ``reasoning`` is what came before the answer."""

    question: str
    answer: str
    reasoning: str = ""

    def messages(self) -> list[Message]:
        answer = {"role": "assistant", "content": self.answer}
        if self.reasoning:
            answer["reasoning_content"] = self.reasoning
        return [{"role": "user", "content": self.question}, answer]


@dataclass
class Conversation:
    """Turns in their order.

    Attributes:
      system: the system message, or None.
      turns: all of them, also those that are not sent any more.
      first: index of the first turn that is sent: earlier ones were dropped for want of room.
    """

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    first: int = 0

    def messages(self, question: str | None = None) -> list[Message]:
        """What the model is sent: the system message, the turns that are left, and the question."""
        return self._messages(self.turns[self.first :], question)

    def _messages(self, turns: list[Turn], question: str | None) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [] if question is None else [{"role": "user", "content": question}]
        return [*system, *(message for turn in turns for message in turn.messages()), *asked]

    def add(self, turn: Turn) -> None:
        self.turns.append(turn)

    def undo(self) -> Turn | None:
        """Takes the last turn away."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.first = min(self.first, len(self.turns))
        return turn

    def reset(self) -> None:
        """Forgets the turns; the system message stays."""
        self.turns, self.first = [], 0

    def make_room(
        self, question: str, count: Callable[[list[Message]], int], context: int, max_tokens: int | None
    ) -> int:
        """Drops the oldest turns from what is sent, if the context is full; returns how many.

        It is full when the prompt leaves less than an eighth of it (or than ``max_tokens``, if those
        are fewer). Turns are then dropped until half of it is free, so that the beginning of the
        prompt stays the same for many turns, and the cache of it can be used. The system message and
        the question stay. A question that does not fit without any turn drops none: it is refused.
        """
        if not self.is_full(count(self.messages(question)), context, max_tokens):
            return 0
        if count(self._messages([], question)) >= context:
            return 0
        before = self.first
        while self.first < len(self.turns) and 2 * count(self.messages(question)) > context:
            self.first += 1
        return self.first - before

    @staticmethod
    def is_full(tokens: int, context: int, max_tokens: int | None) -> bool:
        """Whether a prompt of so many tokens leaves too little room for an answer."""
        room = max(1, context // MIN_ROOM)
        return tokens + min(room, max_tokens or room) > context

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Writes JSON, or Markdown for a name that ends with ``.md``.

        Raises:
          OutputFileError: it cannot be written.
        """
        messages = self._messages(self.turns, None)
        if path.suffix.lower() == ".md":
            text = "\n\n".join(f"## {m['role'].capitalize()}\n\n{m['content']}" for m in messages) + "\n"
        else:
            text = json.dumps({"messages": messages, **settings}, ensure_ascii=False, indent=1) + "\n"
        with open_output(path) as file:
            file.write(text.encode())

    @classmethod
    def load(cls, path: Path) -> tuple["Conversation", dict[str, Any]]:
        """Reads what ``save`` wrote, or a list of messages in OpenAI's form; the second is the settings.

        Raises:
          ValueError: it is no conversation.
          OSError: it cannot be read.
        """
        text = read_text(path)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path} has half of a surrogate pair, which has no UTF-8 form") from error
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise ValueError(f"{path} is no conversation: it needs messages with a role and a text")
        settings = content.get("settings") if isinstance(content, dict) else None
        if not isinstance(settings, dict | None):
            raise ValueError(f"{path}: settings must be an object")
        return cls._of(messages, path), settings or {}

    @classmethod
    def _of(cls, messages: list[Message], path: Path) -> "Conversation":
        found, rest = cls(), list(messages)
        if rest and rest[0]["role"] in ("system", "developer"):
            found.system = rest.pop(0)["content"]
        roles = [message["role"] for message in rest]
        if roles != ["user", "assistant"] * (len(rest) // 2):
            raise ValueError(f"{path}: messages of user and assistant must take turns and end with an answer")
        for question, answer in zip(rest[::2], rest[1::2], strict=True):
            reasoning = answer.get("reasoning_content") or ""
            found.add(Turn(question["content"], answer["content"], reasoning))
        return found


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and all(isinstance(message.get(k), str) for k in ("role", "content"))
        and isinstance(message.get("reasoning_content"), str | None)
    )

"""Log-probabilities in the forms of OpenAI's endpoints.

The jax backend gives them with the tokens. Other backends score an answer when it is complete, so that a
stream has them all in its last chunk.
"""

from collections.abc import Sequence
from typing import Any

from qwen3_moe_jax.core.batch import TokenScore
from qwen3_moe_jax.serve.generation import Answer
from qwen3_moe_jax.serve.http.state import Service

MIN_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""


def _number(value: float) -> float:
    return max(value, MIN_LOGPROB)


async def complete(service: Service, answer: Answer) -> None:
    """Fills in ``answer.scores`` of an answer that has ended, where the engine did not give them."""
    wish = answer.wish
    if wish.top is None or len(answer.scores) == len(answer.token_ids):
        return
    text = [*wish.token_ids, *answer.token_ids]
    found = await service.engine.score(text, first=len(wish.token_ids), top=wish.top)
    answer.scores = [TokenScore(*pair) for pair in zip(found.logprobs, found.top, strict=True)]


class Reported:
    """Which scores of an answer a stream has sent."""

    def __init__(self, service: Service, answer: Answer):
        self._service, self._answer, self._count = service, answer, 0

    def new(self) -> tuple[list[int], list[TokenScore]]:
        """Tokens and their scores since the last call."""
        part = slice(self._count, len(self._answer.scores))
        self._count = len(self._answer.scores)
        return self._answer.token_ids[part], self._answer.scores[part]

    def entries(self) -> list[dict[str, Any]]:
        """The new ones in the form of chats and responses."""
        return entries(self._service, *self.new())


def entries(service: Service, tokens: Sequence[int], scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
    """Tokens with text, bytes, log-probability and rivals."""
    entry = lambda token, value: {
        "token": service.model.token_text(token),
        "logprob": _number(value),
        "bytes": list(service.model.tokenizer.token_bytes(token, show_control=True)),
    }
    return [
        {**entry(token, score.logprob), "top_logprobs": [entry(t, v) for t, v in score.top]}
        for token, score in zip(tokens, scores, strict=True)
    ]


async def of_prompt(service: Service, prompt: Sequence[int], top: int) -> list[TokenScore | None]:
    """Of each token of a prompt; its first has none."""
    if len(prompt) < 2:
        return [None] * len(prompt)
    found = await service.engine.score(list(prompt), first=1, top=top)
    return [None, *(TokenScore(*pair) for pair in zip(found.logprobs, found.top, strict=True))]


class Offsets:
    """Tokens in the form of completions, each with the place where it begins in the text so far."""

    def __init__(self, service: Service, top: int):
        self._service, self._top, self._at = service, top, 0

    def piece(self, tokens: Sequence[int], scores: Sequence[TokenScore | None]) -> dict[str, Any]:
        """The next tokens."""
        texts = [self._service.model.token_text(t) for t in tokens]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._at)
            self._at += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if s is None else _number(s.logprob) for s in scores],
            "top_logprobs": [None if s is None else self._named(s.top[: self._top]) for s in scores],
            "text_offset": offsets,
        }

    def _named(self, row: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Two tokens with one text are told apart by their ids."""
        found: dict[str, float] = {}
        for token, value in row:
            text = self._service.model.token_text(token)
            found[text if text not in found else f"{text}<{token}>"] = _number(value)
        return found

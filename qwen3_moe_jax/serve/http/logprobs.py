"""Log-probabilities in the forms of both OpenAI endpoints. The engine scores the text when it is complete."""

from collections.abc import Sequence
from typing import Any

from qwen3_moe_jax.serve.generation import Answer
from qwen3_moe_jax.serve.http.state import Service

MIN_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""


def _number(value: float) -> float:
    return max(value, MIN_LOGPROB)


async def _scored(service: Service, prompt: Sequence[int], written: Sequence[int], top: int):
    if not written:
        return [], []
    found = await service.engine.score([*prompt, *written], first=len(prompt), top=top)
    return found.logprobs, found.top


async def of_chat(service: Service, answer: Answer, top: int) -> dict[str, Any]:
    """Of every token of an answer, with bytes."""
    own, rivals = await _scored(service, answer.wish.token_ids, answer.token_ids, top)
    entry = lambda token, value: {
        "token": service.model.token_text(token),
        "logprob": _number(value),
        "bytes": list(service.model.tokenizer.token_bytes(token, show_control=True)),
    }
    content = [
        {**entry(token, value), "top_logprobs": [entry(t, v) for t, v in others]}
        for token, value, others in zip(answer.token_ids, own, rivals, strict=True)
    ]
    return {"content": content, "refusal": None}


async def of_completion(
    service: Service, prompt: Sequence[int], written: Sequence[int], top: int, *, echo: bool
) -> dict[str, Any]:
    """Tokens, their log-probabilities and rivals, and where each begins in the text.

    Args:
      echo: the prompt's tokens too; its first has none.
    """
    shown = [*prompt, *written] if echo else list(written)
    first = 1 if echo else len(prompt)
    own: list[float | None] = []
    rivals: list[Any] = []
    if len(prompt) + len(written) > first:
        found = await service.engine.score([*prompt, *written], first=first, top=max(top, 1))
        own, rivals = [_number(v) for v in found.logprobs], found.top
    texts = [service.model.token_text(t) for t in shown]
    tops: list[dict[str, float] | None] = [_named(service, row[:top] if top else []) for row in rivals]
    if echo and shown:
        own, tops = [None, *own], [None, *tops]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {"tokens": texts, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}


def _named(service: Service, row: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Two tokens with one text are told apart by their ids."""
    found: dict[str, float] = {}
    for token, value in row:
        text = service.model.token_text(token)
        found[text if text not in found else f"{text}<{token}>"] = _number(value)
    return found

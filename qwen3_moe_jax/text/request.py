"""What is asked of a model, checked, and the whole answer of a stream."""

from dataclasses import dataclass

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.text.answer import Answer
from qwen3_moe_jax.text.rendered_chat import RenderedChat
from qwen3_moe_jax.text.stream import TextStream


@dataclass(frozen=True)
class Request:
    """A prompt's tokens and how it is answered."""

    token_ids: list[int]
    max_tokens: int
    sampling: Sampling
    chat: RenderedChat | None


def whole(stream: TextStream) -> Answer:
    """The answer that a stream gives when it is read to its end."""
    text = "".join(stream)
    return Answer(text, stream.finish_reason, stream.tokens, stream.prompt_tokens, stream.notes, stream.seed)

"""What is asked of a model, checked, and the whole answer of a stream."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from qwen3_moe_jax.core.arguments import check_count, check_known, check_switch, wrong_kind
from qwen3_moe_jax.core.options import GenerateOptions
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


def check_request(max_tokens: object, sampling: object, thinking: object, overrides: Iterable[str]) -> None:
    """Refuses what is no option of ``Model.open_stream``, or of a wrong kind.

    Raises:
      TypeError: an option that there is not, with the one that may be meant.
      KindError, ValueError: naming the option.
    """
    check_known(overrides, {field.name for field in fields(Sampling)}, GenerateOptions.__annotations__)
    if max_tokens is not None:
        check_count("max_tokens", max_tokens)
    if thinking is not None:
        check_switch("thinking", thinking)
    if not isinstance(sampling, Sampling | None):
        raise wrong_kind("sampling", sampling, "a Sampling")


def whole(stream: TextStream) -> Answer:
    """The answer that a stream gives when it is read to its end."""
    text = "".join(stream)
    return Answer(text, stream.finish_reason, stream.tokens, stream.prompt_tokens, stream.notes, stream.seed)

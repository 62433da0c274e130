"""What is asked of a model, checked, and the whole answer of a stream."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from qwen3_moe_jax.core.arguments import check_count, check_known, check_switch, wrong_kind
from qwen3_moe_jax.core.lookup import PromptLookup
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


def lookup_for(wanted: object) -> PromptLookup | None:
    """What drafts an answer, if that is wanted; raises KindError for what is no switch."""
    check_switch("prompt_lookup", wanted)
    return PromptLookup() if wanted else None


def check_alone(options: dict[str, Any]) -> None:
    """Refuses an option that is for one answer at a time; takes away one that is off.

    Raises:
      ValueError: naming it.
    """
    if options.pop("prompt_lookup", None):
        raise ValueError("prompt_lookup is for one answer at a time: leave it out, or call generate for each")


def whole(stream: TextStream) -> Answer:
    """The answer that a stream gives when it is read to its end."""
    text = "".join(stream)
    facts = (stream.finish_reason, stream.tokens, stream.prompt_tokens, stream.notes, stream.seed)
    return Answer(text, *facts, stream.drafts)

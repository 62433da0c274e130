"""Prompts to token ids, and what can be known of them before a model's weights are read."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.arguments import check_switch, check_text, wrong_kind
from qwen3_moe_jax.core.errors import ContextOverflowError
from qwen3_moe_jax.text.chat_template import find_template, render_chat, special_tokens
from qwen3_moe_jax.text.rendered_chat import RenderedChat
from qwen3_moe_jax.text.tokenizer import Tokenizer, control_tokens

Messages = Sequence[dict[str, Any]]


def rendered(
    prompt: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, object],
    control: Collection[str],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool | None = None,
    prefill: str = "",
    add_generation_prompt: bool = True,
) -> RenderedChat:
    """Messages through a chat template.

    Args:
      prompt: the messages.
      metadata: of the model file.
      control: the vocabulary's control tokens.
      template: Jinja source in place of the file's own, or None.
      tools, thinking: as ``render_chat``.
      prefill: the beginning of the answer.
      add_generation_prompt: as ``render_chat``.

    Raises:
      MessageError, TemplateError: as ``render_chat``.
    """
    chat = render_chat(
        template or find_template(metadata),
        prompt,
        tools,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=thinking,
        special=special_tokens(metadata),
        control_tokens=control,
    )
    return chat.with_prefill(prefill) if prefill else chat


def encoded(
    prompt: str | Messages,
    metadata: Mapping[str, object],
    tokenizer: Tokenizer,
    *,
    prefill: str = "",
    special: bool = False,
    **options: Any,
) -> tuple[list[int], RenderedChat | None]:
    """Token ids of a text, or of messages and what they were rendered to.

    Args:
      prompt: a text or messages.
      metadata, prefill, **options: as ``rendered``; with a text the prefill is a part of the text.
      tokenizer: the model's.
      special: make control tokens of their names in a text (``<|fim_prefix|>``).

    Raises:
      KindError: an argument is of a wrong kind.
      MessageError, TemplateError: as ``render_chat``.
      ValueError: the text has no UTF-8 form.
    """
    check_text("prefill", prefill)
    check_switch("special", special)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt + prefill, parse_special=special), None
    if not isinstance(prompt, list | tuple):
        raise wrong_kind("a prompt", prompt, "a text or a list of messages")
    chat = rendered(prompt, metadata, tokenizer.control_tokens, prefill=prefill, **options)
    return tokenizer.encode_chat(chat), chat


def check_room(num_tokens: int, max_context: int) -> int:
    """Tokens that a context leaves for the answer to a prompt.

    Raises:
      ContextOverflowError: none.
    """
    if num_tokens >= max_context:
        raise ContextOverflowError(num_tokens, max_context)
    return max_context - num_tokens


class Opened:
    """A model file that is open and whose weights are not read.

    Attributes:
      source: the open file.
      max_context: tokens that its cache is going to hold.
    """

    def __init__(self, source: ModelSource, max_context: int, tokenizer: Callable[[], Tokenizer]):
        self.source, self.max_context = source, max_context
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's: seconds for a large vocabulary on a busy machine, and only the first time."""
        return self._tokenizer()

    def check(
        self, prompt: str | Messages, *, prefill: str = "", special: bool = False, **options: Any
    ) -> None:
        """Refuses a prompt that the loaded model would refuse; arguments and errors as ``encoded``.

        A text has at most one token per byte, and one that begins it: one that is short needs no tokenizer.

        Raises:
          ContextOverflowError: it does not leave room for an answer.
        """
        metadata = self.source.metadata
        if isinstance(prompt, str):
            text = prompt + prefill
        else:
            text = rendered(prompt, metadata, control_tokens(metadata), prefill=prefill, **options).text
        if len(text.encode(errors="replace")) + 1 < self.max_context:
            return
        ids, _ = encoded(prompt, metadata, self.tokenizer, prefill=prefill, special=special, **options)
        check_room(len(ids), self.max_context)

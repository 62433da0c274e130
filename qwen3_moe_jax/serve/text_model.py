"""What the front knows of the model: name, tokenizer, chat template, recommended sampling. No weights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.sampling import Sampling, recommended_sampling
from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.text.chat_template import (
    RenderedChat,
    find_template,
    has_thinking_switch,
)
from qwen3_moe_jax.text.prompts import rendered
from qwen3_moe_jax.text.tokenizer import Tokenizer

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")

_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n?", re.MULTILINE)
"""Claude Code begins its system prompt with this line and changes it with every request."""


def without_billing_header(text: str) -> str:
    """A system prompt without the line that would spoil the prefix cache; the model has no use for it."""
    return _BILLING.sub("", text)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and whether the answer begins inside ``<think>``."""

    token_ids: list[int]
    starts_in_reasoning: bool = False
    text: str = ""


class TextModel:
    """The text side of a model file.

    Attributes:
      name: what clients are told.
      tokenizer: the file's.
      metadata: the file's, tensors left out.
      vocab_size: rows of the embedding.
      context: tokens that the file's model was trained for.
      num_layers, num_experts: for the page's heatmap.
    """

    def __init__(self, path: str | Path | None = None, *, name: str | None = None):
        """Reads the file's header.

        Raises:
          ModelFileError: the file cannot be used.
        """
        with open_model(path or embedded_model()) as source:
            self.metadata: Mapping[str, Any] = source.metadata
            self.name = name or str(source.metadata.get("general.name") or source.path.stem)
            self.vocab_size = source.config.vocab_size
            self.context = source.config.max_position_embeddings
            self.num_layers = source.config.num_hidden_layers
            self.num_experts = source.config.num_experts
        self.tokenizer = Tokenizer(self.metadata, vocab_size=self.vocab_size)

    @cached_property
    def template(self) -> str | None:
        """The chat template; None if the file has none."""
        try:
            return find_template(self.metadata)
        except ValueError:
            return None

    @property
    def call_format(self) -> str:
        """How the template tells the model to write calls: "coder" (XML) or "hermes" (JSON)."""
        return "coder" if "<function=" in (self.template or "") else "hermes"

    @property
    def has_thinking_switch(self) -> bool:
        return has_thinking_switch(self.template or "")

    def sampling(self, *, thinking: bool | None) -> Sampling:
        """What the file or its family recommends."""
        return recommended_sampling(self.metadata, thinking=thinking)[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        thinking: bool | None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The prompt of a conversation.

        Raises:
          MessageError, TemplateError: see ``render_chat``.
        """
        chat = self.render(messages, tools, thinking=thinking, add_generation_prompt=add_generation_prompt)
        return Prompt(self.tokenizer.encode_chat(chat), chat.starts_in_reasoning, chat.text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        thinking: bool | None,
        add_generation_prompt: bool = True,
    ) -> RenderedChat:
        """As ``chat``, the text alone."""
        return rendered(
            messages,
            self.metadata,
            self.tokenizer.control_tokens,
            tools=tools,
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
        )

    def template_fault(self) -> str | None:
        """Why the chat template does not render so much as one message; None if it does."""
        try:
            self.render([{"role": "user", "content": "hi"}], None, thinking=None)
        except ValueError as error:
            return str(error)
        return None

    def raw(self, text: str) -> Prompt:
        """The prompt of plain text, in which control tokens count."""
        return Prompt(self.tokenizer.encode(text, parse_special=True), text=text)

    def fill_in_middle(self, prefix: str, suffix: str) -> Prompt:
        """The prompt for what stands between two texts.

        Raises:
          ValueError: the model has no tokens for it.
        """
        encode = lambda text: self.tokenizer.encode(text)
        marks = [self.tokenizer.encode(t, parse_special=True) for t in FIM_TOKENS]
        if any(len(ids) != 1 for ids in marks):
            raise ValueError("this model has no tokens for filling in the middle")
        ids = [*marks[0], *encode(prefix), *marks[1], *encode(suffix), *marks[2]]
        return Prompt(ids)

    def token_text(self, token_id: int) -> str:
        """A token as clients see it, control tokens spelled out; bytes that are no text are escaped."""
        raw = self.tokenizer.token_bytes(token_id, show_control=True)
        return raw.decode("utf-8", errors="backslashreplace")

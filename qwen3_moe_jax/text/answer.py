"""What a generation gives: a text that knows how it came about."""

from collections.abc import Sequence

from qwen3_moe_jax.core.lookup import Drafts


class Answer(str):
    """A finished generation: a ``str``, equal to its text, with fields.

    Attributes:
      finish_reason: "stop" (an end token or a stop string) or "length".
      tokens: ids that were written, without an end token; a stop string's are among them.
      prompt_tokens: tokens of the prompt.
      notes: what the user should know of how the prompt was made, one line each.
      seed: the same seed gives the same answer again.
      drafts: what became of the drafts of prompt lookup, or None without it.
    """

    finish_reason: str | None
    tokens: tuple[int, ...]
    prompt_tokens: int
    notes: tuple[str, ...]
    seed: int | None
    drafts: Drafts | None

    def __new__(
        cls,
        text: str = "",
        finish_reason: str | None = None,
        tokens: Sequence[int] = (),
        prompt_tokens: int = 0,
        notes: Sequence[str] = (),
        seed: int | None = None,
        drafts: Drafts | None = None,
    ) -> "Answer":
        self = super().__new__(cls, text)
        self.finish_reason, self.tokens = finish_reason, tuple(tokens)
        self.prompt_tokens, self.notes, self.seed = prompt_tokens, tuple(notes), seed
        self.drafts = drafts
        return self

    @property
    def text(self) -> str:
        """What was written, as a plain ``str``."""
        return str.__str__(self)

    @property
    def new_tokens(self) -> int:
        """How many tokens were written."""
        return len(self.tokens)

"""A chat as the prompt that the model reads."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RenderedChat:
    """A chat as the prompt that the model reads.

    Attributes:
      text: the prompt.
      inert: ascending places of characters in ``text`` that came from messages or tools
        and must not be part of a control token.
      notes: what the user should know, one line each.
      tracked: control tokens without ``|`` whose characters ``inert`` has, too.
      prefill: the end of ``text`` that is the beginning of the answer.
    """

    text: str
    inert: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    tracked: frozenset[str] = frozenset()
    prefill: str = ""

    @property
    def starts_in_reasoning(self) -> bool:
        """Whether the prompt ends inside an open ``<think>``, so that the answer starts with reasoning."""
        opening = self.text.removesuffix(self.prefill).rstrip()
        is_open = opening.endswith("<think>") or self.prefill.lstrip().startswith("<think>")
        return is_open and "</think>" not in self.prefill

    def with_prefill(self, prefill: str) -> "RenderedChat":
        """The chat with the beginning of the answer, in which control tokens stay text."""
        places = range(len(self.text), len(self.text) + len(prefill))
        return replace(self, text=self.text + prefill, inert=(*self.inert, *places), prefill=prefill)

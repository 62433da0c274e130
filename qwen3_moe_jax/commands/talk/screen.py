"""How an answer is shown while it is written: Markdown on a terminal, the text itself elsewhere.

Markdown is rendered block by block. A block that another one follows cannot change any more: it is
written for good. The last one is drawn again as it grows, its end alone where it is higher than the
window, so that scrolling back shows every line once.
"""

import time
from typing import Any, Literal, Protocol

from qwen3_moe_jax.core import terminal
from qwen3_moe_jax.text.stream import END_THINK, THINK, Piece

SECONDS_PER_FRAME = 0.08

Reasoning = Literal["show", "fold", "hide"]
"""What is shown of a model's reasoning: its text, one line that says how long it took, nothing."""


class Screen(Protocol):
    """Takes the pieces of one answer."""

    def take(self, piece: Piece) -> None: ...

    def finish(self) -> None:
        """After the last piece, also of an answer that was stopped."""
        ...


def make_screen(reasoning: Reasoning, *, plain: bool) -> Screen:
    """The screen for standard output: plain where that is no terminal, or is asked for."""
    return PlainScreen(reasoning) if plain or not terminal.can_style() else StyledScreen(reasoning)


class PlainScreen:
    """Text as the model writes it, reasoning between its tags."""

    def __init__(self, reasoning: Reasoning):
        self._shows = reasoning == "show"
        self._kind = "content"

    def take(self, piece: Piece) -> None:
        if piece.kind == "reasoning" and not self._shows:
            return
        if piece.kind != self._kind:
            self._kind = piece.kind
            terminal.show_text(f"{THINK}\n" if piece.kind == "reasoning" else f"\n{END_THINK}\n\n")
        terminal.show_text(piece.text)

    def finish(self) -> None:
        terminal.show_text("\n")


class StyledScreen:
    """Markdown for what is said, dim text for reasoning."""

    def __init__(self, reasoning: Reasoning):
        self._reasoning = reasoning
        self._console = terminal.styled()
        self._blocks: _Blocks | None = None
        self._status = terminal.Status()
        self._began: float | None = None
        self._thought = 0.0

    def take(self, piece: Piece) -> None:
        if piece.kind == "reasoning":
            self._reason(piece.text)
            return
        if self._blocks is None:
            self._end_reasoning()
            self._blocks = _Blocks(self._console)
        self._blocks.write(piece.text)

    def _reason(self, text: str) -> None:
        now = time.monotonic()
        began = self._began = self._began or now
        if self._reasoning == "show":
            self._dim(text)
        elif self._reasoning == "fold" and (now - began) // 1 != self._thought // 1:
            self._status.show(f"thinking, {now - began:.0f} s ...")
        self._thought = now - began

    def _dim(self, text: str) -> None:
        from rich.text import Text

        self._console.print(Text(terminal.harmless(text), "dim italic"), end="", soft_wrap=True)

    def _end_reasoning(self) -> None:
        if self._began is None:
            return
        self._status.clear()
        if self._reasoning == "show":
            self._console.print("\n")
        elif self._reasoning == "fold":
            seconds = time.monotonic() - self._began
            self._dim(f"thought for {seconds:.1f} s; /thinking shows it\n\n")
        self._began = None

    def finish(self) -> None:
        if self._blocks is None:
            self._end_reasoning()
        else:
            self._blocks.finish()
        self._console.print()


class _Blocks:
    """The Markdown of one answer on a console of ``rich``."""

    def __init__(self, console: Any):
        from rich.live import Live

        self._console = console
        self._open = ""
        self._drawn = 0.0
        self._has_blocks = False
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,  # core.terminal writes to the real streams
            redirect_stderr=False,
        )
        self._live.start()

    def write(self, text: str) -> None:
        self._open += terminal.harmless(text)
        now = time.monotonic()
        if now - self._drawn >= SECONDS_PER_FRAME:
            self._drawn = now
            self._draw()

    def _draw(self) -> None:
        closed, self._open = closed_blocks(self._open)
        if closed:
            self._keep(closed)
        self._live.update(_Tail(markdown(self._open)), refresh=True)

    def _keep(self, text: str) -> None:
        if self._has_blocks:
            self._console.print()
        self._has_blocks = True
        self._console.print(markdown(text))

    def finish(self) -> None:
        """The open block is written for good."""
        from rich.text import Text

        self._live.update(Text(""))
        self._live.stop()
        if self._open.strip():
            self._keep(self._open)
        self._open = ""


def closed_blocks(text: str) -> tuple[str, str]:
    """The blocks of a Markdown text that can change no more, and the last one."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt().enable("table").parse(text)
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map and token.nesting >= 0]
    lines = text.split("\n")
    last = starts[-1] if starts else 0
    return "\n".join(lines[:last]).rstrip("\n"), "\n".join(lines[last:])


def markdown(text: str) -> Any:
    """A renderable of ``rich``: headings stand left, links show their address, code has few colours."""
    from rich import markdown as rich_markdown
    from rich.syntax import Syntax

    class Heading(rich_markdown.Heading):
        def __rich_console__(self, console, options):
            self.text.justify = "left"
            yield self.text

    class CodeBlock(rich_markdown.CodeBlock):
        def __rich_console__(self, console, options):
            code = str(self.text).rstrip()
            yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=0)

    class Markdown(rich_markdown.Markdown):
        own = {"heading_open": Heading, "fence": CodeBlock, "code_block": CodeBlock}  # noqa: RUF012
        elements = {**rich_markdown.Markdown.elements, **own}  # noqa: RUF012

    return Markdown(text, code_theme="ansi_dark", hyperlinks=False)


class _Tail:
    """The last lines of a renderable, as many as the window has."""

    def __init__(self, renderable: Any):
        self._renderable = renderable

    def __rich_console__(self, console, options):
        from rich.segment import Segment

        lines = console.render_lines(self._renderable, options, pad=False)
        while lines and not "".join(segment.text for segment in lines[-1]).strip():
            lines.pop()
        for line in lines[-max(1, console.size.height - 2) :]:
            yield from line
            yield Segment.line()

"""A picture of a terminal: the bytes that a program wrote become the screen that a person saw, as SVG."""

import io
import itertools
import re

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

BASIC = {"default": None, "brown": "yellow", "bfightmagenta": "bright_magenta"}
"""Names that pyte gives to colours, where rich has others."""

FORMAT_NAME = "screen"


def svg_of(output: bytes, *, lines: int, columns: int, title: str) -> str:
    """The screen after ``output``, without the empty lines at its end."""
    screen = pyte.Screen(columns, lines)
    pyte.ByteStream(screen).feed(_plain(output))
    console = Console(record=True, width=columns, height=lines, file=io.StringIO(), force_terminal=True)
    last = max((y for y in range(lines) if screen.display[y].strip()), default=0)
    for y in range(last + 1):
        console.print(_line(screen, y, columns), no_wrap=True, overflow="crop")
    svg = console.export_svg(title=title, unique_id=FORMAT_NAME)
    return _without_web_fonts(svg)


def _plain(output: bytes) -> bytes:
    """What pyte cannot read taken out: keyboard modes, and colons in colours."""
    output = re.sub(
        rb"\x1b\[[<>=?][0-9;]*[a-gi-zA-Z]", lambda m: m[0] if m[0].endswith((b"h", b"l")) else b"", output
    )
    return re.sub(rb"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)", b"", output)


def _line(screen: pyte.Screen, y: int, columns: int) -> Text:
    """A line in runs of one style."""
    text = Text()
    for style, cells in itertools.groupby((screen.buffer[y][x] for x in range(columns)), _style):
        text.append("".join(cell.data for cell in cells), style)
    text.rstrip()
    return text


def _style(cell: pyte.screens.Char) -> Style:
    return Style(
        color=_colour(cell.fg),
        bgcolor=_colour(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        reverse=cell.reverse,
    )


def _colour(name: str) -> str | None:
    if re.fullmatch(r"[0-9a-f]{6}", name):
        return f"#{name}"
    name = BASIC.get(name, name)
    return name and re.sub(r"^bright(?=[a-z])", "bright_", name)


def _without_web_fonts(svg: str) -> str:
    """The viewer's own fonts: a picture fetches nothing."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "DejaVu Sans Mono").replace("https://www.textualize.io", "")

"""What every picture shares: matplotlib where it is installed, fonts for the text's script, formats.

matplotlib is an extra (``[plot]``). Text stays text in SVG, so that the viewer's fonts draw it. In the other
formats each character is drawn with a font of this machine that has it, and one that no font has is written
as its number.
"""

import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qwen3_moe_jax.convert.errors import printable
from qwen3_moe_jax.core.output_file import check_output, save_seekable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = {".png": "png", ".svg": "svg", ".pdf": "pdf", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
"""Formats of pictures by the file's suffix."""

INSTALL = "pictures need matplotlib: pip install 'qwen3-moe-jax[plot]'"

INK, PALE, ACCENT = "#202024", "#6e6e76", "#2c718e"
DPI = 144

NO_TEXT_FONTS = ("Last Resort", "cm", "STIXSize", "STIXNonUnicode")
"""Fonts that come with matplotlib and have boxes, or signs of mathematics in the places of letters."""

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e4e4e8",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "qwen3_moe_jax",
    "text.parse_math": False,
}


class PicturesUnavailableError(RuntimeError):
    """matplotlib is not installed."""

    def __init__(self):
        super().__init__(INSTALL)


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def check_drawing() -> None:
    """Raises PicturesUnavailableError without matplotlib."""
    if not can_draw():
        raise PicturesUnavailableError


def drawn(path: str | Path, draw: Callable[[], "Figure"]) -> None:
    """Writes a picture in the format that the path's suffix names, one of ``PICTURES``.

    Args:
      path: of the file.
      draw: makes the figure; called with our style set.

    Raises:
      OutputFileError: another suffix, or the file cannot be written.
      PicturesUnavailableError: matplotlib is not installed.
    """
    check_output(path, tuple(PICTURES))
    check_drawing()
    kind = PICTURES[Path(path).suffix.lower()]
    save_seekable(path, lambda file: _save(file, kind, draw))


def _matplotlib(module: str) -> Any:
    """A module of matplotlib, whose own types are only partly known."""
    return importlib.import_module(module)


def png_of(draw: Callable[[], "Figure"]) -> bytes:
    """A picture as PNG in memory, for notebooks."""
    file = io.BytesIO()
    _save(file, "png", draw)
    return file.getvalue()


def _save(file: IO[bytes], kind: str, draw: Callable[[], "Figure"]) -> None:
    mpl = _matplotlib("matplotlib")
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # SVG: the viewer's fonts have it
        figure: Any = draw()
        figure.savefig(file, format=kind, dpi=DPI, facecolor="white", metadata=dates.get(kind))


def words(text: str, maximum: int, kind: str = "png") -> tuple[str, list[str]]:
    """A text as it can be drawn, in one line of at most ``maximum`` characters, and the fonts for it."""
    line = printable(" ".join(text.split()))
    line = line if len(line) <= maximum else line[: maximum - 1] + "\u2026"
    fonts = [name for name, _ in _needed(line)]
    if kind == "svg":  # the viewer's fonts draw it
        return line, ["DejaVu Sans", *fonts, "sans-serif"]
    line = "".join(c if _has_any(c) else f"<U+{ord(c):04X}>" for c in line)
    return line if len(line) <= maximum else line[: maximum - 1] + "\u2026", ["DejaVu Sans", *fonts]


def _needed(line: str) -> list[tuple[str, frozenset[int]]]:
    """Fonts of this machine for the characters that matplotlib's own font lacks."""
    missing = {ord(c) for c in line} - _own()
    found: list[tuple[str, frozenset[int]]] = []
    for name, has in _others() if missing else ():
        if missing & has:
            found.append((name, has))
            missing -= has
    return found


def _has_any(character: str) -> bool:
    return ord(character) in _own() or any(ord(character) in has for _, has in _others())


@cache
def _own() -> frozenset[int]:
    return _characters(_matplotlib("matplotlib.font_manager").findfont("DejaVu Sans"))


@cache
def _others() -> tuple[tuple[str, frozenset[int]], ...]:
    """Every upright font of the machine and its characters, those with most of them first."""
    entries: dict[str, str] = {}
    for entry in _matplotlib("matplotlib.font_manager").fontManager.ttflist:
        is_upright = entry.style == "normal" and str(entry.weight) in ("400", "normal", "regular", "book")
        if is_upright and not entry.name.startswith(NO_TEXT_FONTS):
            entries.setdefault(entry.name, entry.fname)
    fonts = [(name, _characters(path)) for name, path in entries.items()]
    return tuple(sorted(fonts, key=lambda font: -len(font[1])))


def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(_matplotlib("matplotlib.ft2font").FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # no font that this library reads
        return frozenset()

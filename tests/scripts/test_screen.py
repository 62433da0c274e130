"""Pictures of terminals for the docs: what was on the screen, and nothing that is fetched."""

import html
import re

from scripts._screen import svg_of


def shown(svg: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", svg.partition("</style>")[2])).replace("\xa0", " ")


def test_a_screen_is_what_a_person_saw():
    """Written over, cleared, coloured, with sequences that the emulator does not know."""
    output = b"old\r\x1b[K\x1b[1;32m> \x1b[0mdef f(x):\r\n"
    output += b"\x1b[?2004h\x1b[>4;1m\x1b]0;title\x07\x1b[38;2;1;2;3mrgb\x1b[0m \xe4\xbd\xa0"
    svg = svg_of(output, lines=5, columns=40, title="a & b")
    text = shown(svg)
    assert "def f(x):" in text
    assert "rgb" in text
    assert "\u4f60" in text
    assert "old" not in text
    assert "a & b" in text
    assert "#010203" in svg
    assert not re.search(r"https?://(?!www\.w3\.org)", svg)

"""Names follow the style sheet of CONTRIBUTING.md, as far as a program can tell."""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("convert", "kernels_pallas", "qwen3_moe_jax", "scripts", "tests", "docs/examples")
INSTEAD = {
    "most": "maximum, or MAX_",
    "least": "minimum, or MIN_",
    "fewest": "minimum, or MIN_",
    r"\w+_an?_(?:byte|expert|launch|layer|request|row|second|step|token)": "per",
}
"""Names that are not to be, in any case, and what is written for them."""
UNWANTED = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b", re.IGNORECASE)


def names(text: str) -> Iterator[tuple[int, str]]:
    """(line, name) of the unwanted names of Python source; comments and strings may have the words."""
    if UNWANTED.search(text):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and UNWANTED.fullmatch(token.string):
                yield token.start[0], token.string


@pytest.mark.smoke
def test_no_name_is_one_of_the_words_that_are_not_written():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in files}
    found = [f"{path}:{line} {name}" for path, text in texts.items() for line, name in names(text)]
    assert not found, f"{'; '.join(found)}: {INSTEAD}"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("most = 1  # at most", 1),
        ("def f(least): ...", 1),
        ("MOST = max_ms_a_step", 2),
        ("at_most = most_common = 'the most'", 0),
    ],
)
def test_a_name_that_is_not_written_is_found(text, count):
    assert len(list(names(text))) == count

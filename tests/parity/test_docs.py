"""The code in ``docs/research.md`` runs as it is written."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["research.md"])
def test_examples_run(name, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")

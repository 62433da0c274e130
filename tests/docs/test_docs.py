"""The docs are true: tables are what the receipts say, examples and blocks of code run, the log is listed."""

import os
import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from scripts import ROOT, make_tables

DOCS = ROOT / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))


def test_every_table_is_what_the_receipts_say():
    assert make_tables.main(["--check"]) == 0, "run python -m scripts.make_tables"


def test_a_number_that_no_receipt_has_is_seen():
    page = "<!-- table: decode -->\n| work | tokens/s |\n<!-- end of table -->\n"
    assert make_tables.filled(page) != page
    with pytest.raises(KeyError, match="unknown"):
        make_tables.filled("<!-- table: unknown -->\n<!-- end of table -->\n")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path))
    assert capsys.readouterr().out.strip()


def test_blocks_of_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the guide that is one session from its first block to its last."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guides" / "inside.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"inside.md, block {number}", "exec"), namespace)
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_lists_every_entry():
    listed = re.findall(r"\((\d{4}-\d\d-\d\d-[\w-]+\.md)\)", (DOCS / "log" / "index.md").read_text())
    assert sorted(listed) == sorted(path.name for path in (DOCS / "log").glob("[0-9]*.md"))


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_readmes_tree_names_every_room():
    """Every folder of the package, and no folder that is not there."""
    blocks = (ROOT / "README.md").read_text().split("```")
    tree = next(block for block in blocks if block.startswith("\nconvert/"))
    named = set(re.findall(r"(\w+)/(?= )", tree)) - {"decode_step"}
    package = ROOT / "qwen3_moe_jax"
    rooms = {p.name for p in package.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))}
    assert not rooms - named, "in the package and not in the README"
    assert not [name for name in named if not ((ROOT / name).is_dir() or (package / name).is_dir())]


def test_links_of_texts_outside_the_site_lead_somewhere():
    """Links of the site's own pages are checked when it is built."""
    for path in ROOT.glob("*.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (ROOT / link).exists(), f"{path.name}: {link}"


def test_every_test_that_the_reliability_page_names_exists():
    """As ``file.py::test``, or ``::test`` of the file that was named before it."""
    file = None
    page = (DOCS / "reliability.md").read_text()
    for name, test in re.findall(r"`([\w/]*(?:\.py)?)::(test_\w+)`", page):
        file = name or file
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_the_notebook_runs(tmp_path: Path):
    """Each cell, in a kernel, with the backend that compiles nothing in the place of the default."""
    notebook = nbformat.read(DOCS / "examples" / "first_hour.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("q3.load()", 'q3.load(backend="reference", gate=False)')
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    texts = [str(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs]
    assert texts[0].startswith("<Model tiny-coder-Q4_K_M.gguf: 6 layers")
    assert "closed" in texts[-1]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "two-texts.svg").exists()

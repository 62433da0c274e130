"""The scripts are a package: each starts by its module's name, and none reaches for ``sys.path``."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_moe_jax.machine.child_environment import child_environment
from scripts import ROOT
from scripts.check_wheel import USER_SCRIPT, receipt_of, write_user_folder

NAMES = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if not path.stem.startswith("_"))

HELP_OF_ALL = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(f"scripts.{name}", run_name="__main__")
        except SystemExit as end:
            assert not end.code, (name, end.code)
    assert "usage:" in out.getvalue(), name
"""


def test_every_script_starts(tmp_path: Path):
    """All in one process, because most of a start is the import of JAX."""
    command = [sys.executable, "-c", HELP_OF_ALL, *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=child_environment())
    assert done.returncode == 0, done.stderr


def test_the_wheels_receipt_has_the_command_that_makes_it_again_and_its_commit():
    """The versions that were asked for: 3.12.1, which is what one was, names no interpreter."""
    found = receipt_of(ROOT / "LICENSE", ["3.12"], [{"python": "3.12.1"}])
    assert found["command"] == "python -m scripts.check_wheel --clean 3.12"
    assert found["commit"] or not (ROOT / ".git").exists()


@pytest.mark.parametrize("name", NAMES)
def test_no_script_changes_the_path(name: str):
    assert "sys.path" not in (ROOT / "scripts" / f"{name}.py").read_text()


def test_texts_name_scripts_that_exist():
    """In help, docs and messages: ``python -m scripts.NAME``, never the file."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").glob("*.py")]
    for path in texts:
        text = path.read_text()
        assert not re.findall(r"python scripts/\w+\.py", text), path
        assert set(re.findall(r"-m scripts\.(\w+)", text)) - {"NAME"} <= set(NAMES), path


def test_a_users_module_named_convert_is_not_ours(tmp_path: Path):
    """A user's own ``convert.py`` and ``kernels_pallas.py`` beside the script that loads a model."""
    write_user_folder(tmp_path / "user")
    done = subprocess.run(
        [sys.executable, USER_SCRIPT],
        capture_output=True,
        text=True,
        cwd=tmp_path / "user",
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

"""The order of imports: a room imports from rooms to its left alone, wherever in a file the import stands.

import-linter does not follow the links by which ``convert`` and ``kernels_pallas`` are part of the
package in a clone, so the order is held here.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "qwen3_moe_jax"

ORDER = (
    ("convert",),
    ("kernels_pallas",),
    ("core",),
    ("text", "machine"),
    ("hub",),
    ("reference", "wgpu_backend", "jax_backend"),
    ("loader",),
    ("measure", "inspection"),
    ("parity",),
    ("research",),
    ("api",),
    ("serve",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""Left to right; rooms of one line do not know each other."""

RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
TESTS_ALONE = "testing"


def files() -> list[Path]:
    rooms = [ROOT / "convert", ROOT / "kernels_pallas", ROOT / PACKAGE]
    return [path for room in rooms for path in sorted(room.rglob("*.py")) if not _is_linked(path)]


def _is_linked(path: Path) -> bool:
    return (
        path.is_relative_to(ROOT / PACKAGE)
        and path.relative_to(ROOT / PACKAGE).parts[0] in ORDER[0] + ORDER[1]
    )


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            yield node.lineno, node.module or ""
            if node.module == PACKAGE:
                yield from ((node.lineno, f"{PACKAGE}.{alias.name}") for alias in node.names)


def faults(path: Path, text: str) -> list[str]:
    room, found = room_of(path), []
    for line, module in imported(ast.parse(text)):
        head, _, rest = module.partition(".")
        if head in ("convert", "kernels_pallas", "tests", "scripts"):
            found.append(f"{path.name}:{line} imports {module}")
        target = rest.split(".")[0]
        if head != PACKAGE or not target or target in (room, "__version__"):
            continue
        if target == TESTS_ALONE and room != TESTS_ALONE:
            found.append(f"{path.name}:{line} imports {module}, which is for tests and scripts")
        elif room in RANK and RANK.get(target, -1) >= RANK[room]:
            found.append(
                f"{room}/{path.name}:{line} imports {module}: {room} is left of {target}, or beside it"
            )
    return found


@pytest.mark.smoke
def test_left_never_imports_right():
    wrong = [
        fault
        for path in files()
        if path.name != "__init__.py" or path.parent.name != PACKAGE
        for fault in faults(path, path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


ASKED = re.compile(r"\b(?:getattr|hasattr)\((?:\w+\.)*(?:runner|batch), .*")


@pytest.mark.smoke
def test_nobody_asks_a_runner_or_a_batch_what_it_has():
    """What each can do is said by its protocol and by ``Capabilities``."""
    texts = {path: path.read_text() for path in files()}
    found = [f"{path.name}: {asked[0]}" for path, text in texts.items() for asked in ASKED.finditer(text)]
    assert not found, "\n".join(found)


def test_every_room_has_a_place():
    rooms = {room_of(path) for path in files()} - {"__init__", TESTS_ALONE}
    assert rooms == RANK.keys()


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("convert/x.py", "import qwen3_moe_jax.core.errors"),
        ("qwen3_moe_jax/machine/x.py", "from qwen3_moe_jax.wgpu_backend import adapter"),
        ("qwen3_moe_jax/machine/x.py", "def f():\n    from qwen3_moe_jax import loader"),
        ("qwen3_moe_jax/wgpu_backend/x.py", "from qwen3_moe_jax.jax_backend.runner import JaxRunner"),
        ("qwen3_moe_jax/loader.py", "from qwen3_moe_jax.parity.gate import check_once"),
        ("qwen3_moe_jax/parity/x.py", "from qwen3_moe_jax.api import load"),
        ("qwen3_moe_jax/core/x.py", "from qwen3_moe_jax.testing import faults"),
        ("qwen3_moe_jax/core/x.py", "import convert.config"),
        ("qwen3_moe_jax/core/x.py", "from tests import tolerances"),
    ],
)
def test_a_wrong_import_is_seen(room, line):
    assert len(faults(ROOT / room, line)) == 1


SLOW_TO_IMPORT = (
    "flax",
    "jax.experimental.pallas",
    "wgpu",
    "orbax",
    "IPython",
    "qwen3_moe_jax.parity.verify",
)
"""Each takes 0.1 to 0.6 s, and a model whose programs are on disk is loaded and runs without them."""


def test_a_loaded_model_has_not_imported_what_it_does_not_use():
    code = f"""
import sys
import qwen3_moe_jax.cli, qwen3_moe_jax.commands.generate, qwen3_moe_jax.jax_backend.runner
from qwen3_moe_jax.jax_backend.decode_path import OneKernel
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
import jax
OneKernel().reason_on(jax.devices("cpu")[0], Qwen3Moe(None), {{}})
print(*(name for name in {SLOW_TO_IMPORT} if name in sys.modules))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []

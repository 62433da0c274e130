"""Counts what a reader of the tree has to hold: modules, rooms, imports between rooms, the longest file.

    python -m scripts.count_structure            # this tree
    python -m scripts.count_structure FOLDER     # another one, as of an earlier commit

A room is a folder of the package or one of its modules; ``convert`` and ``kernels_pallas`` are rooms. An
import counts wherever in a file it stands. Rooms that import each other, directly or by way of others, are
in a circle. The last line is JSON.
"""

import argparse
import ast
import json
from collections.abc import Iterator
from pathlib import Path

from scripts import ROOT

PACKAGE = "qwen3_moe_jax"
BESIDE = ("convert", "kernels_pallas")
TESTING = "testing"
"""Serves tests and scripts alone: no room of the product."""


def modules(root: Path) -> list[Path]:
    """Of the product, each once: the package's links to the folders beside it are passed over."""
    found = [path for folder in (*BESIDE, PACKAGE) for path in sorted((root / folder).rglob("*.py"))]
    links = {root / PACKAGE / folder for folder in BESIDE}
    return [path for path in found if not links & set(path.parents)]


def room_of(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return parts[1] if parts[0] == PACKAGE else parts[0]


def targets(tree: ast.AST, rooms: set[str]) -> Iterator[str]:
    """The room of every import; the folders beside the package had bare names once."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            room = name.removeprefix(f"{PACKAGE}.").split(".")[0]
            if room in rooms:
                yield room


def reachable(arrows: set[tuple[str, str]], room: str) -> set[str]:
    found, todo = set(), [room]
    while todo:
        here = todo.pop()
        fresh = {b for a, b in arrows if a == here} - found
        found |= fresh
        todo += fresh
    return found


def count(root: Path) -> dict[str, object]:
    """The figures of a tree."""
    files = [p for p in modules(root) if room_of(root, p) not in (TESTING, "__init__")]
    rooms = {room_of(root, path) for path in files}
    imports = [
        (room_of(root, path), target)
        for path in files
        for target in targets(ast.parse(path.read_text()), rooms)
        if target != room_of(root, path)
    ]
    arrows = set(imports)
    circles = {room for room in rooms if room in reachable(arrows, room)}
    lengths = {path: path.read_bytes().count(b"\n") for path in modules(root)}
    longest = max(lengths, key=lambda path: lengths[path])
    return {
        "modules": len(files),
        "modules_at_the_root": len([p for p in (root / PACKAGE).glob("*.py") if p.name != "__init__.py"]),
        "rooms": len(rooms),
        "imports_between_rooms": len(imports),
        "arrows_between_rooms": len(arrows),
        "rooms_in_circles": sorted(circles),
        "longest_file": f"{longest.relative_to(root)}: {lengths[longest]}",
        "files_over_450_lines": sum(n > 450 for n in lengths.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT)
    found = count(parser.parse_args().folder)
    for name, value in found.items():
        print(f"{name.replace('_', ' '):24} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""A hash of this project's own code, for receipts and caches: the same code gives the same text."""

import hashlib
from functools import cache
from pathlib import Path

PACKAGES = ("convert", "kernels_pallas", "qwen3_moe_jax")
SUFFIXES = {".py", ".wgsl", ".toml", ".json"}


@cache
def code_version() -> str:
    """Sixteen hexadecimal digits over every source file of the three packages, by name and content."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

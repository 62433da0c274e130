"""What damages a checkpoint, as chance or as a hostile author would, and what reads all of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    PIECE_BYTES,
    checksum_file,
    piece_digest,
)
from qwen3_moe_jax.convert.open_model import open_model

DOWN = "layers.1.mlp.experts.down_proj"


def load_everything(path: Path) -> None:
    with open_model(path) as source:
        for _ in source.tensors():
            pass


def edit_json(folder: Path, name: str, edit: Callable[[dict], object]) -> None:
    """Changes a JSON file and makes all digests right again, as a hostile author would."""
    content = json.loads((folder / name).read_text())
    content = edit(content) or content
    sign(folder, name, json.dumps(content).encode())


def sign(folder: Path, name: str, data: bytes) -> None:
    """Writes a file and makes all digests right again."""
    (folder / name).write_bytes(data)
    manifest = (folder / MANIFEST_NAME).read_bytes()
    if name != MANIFEST_NAME:
        fields = json.loads(manifest)
        digests = [piece_digest(data[i : i + PIECE_BYTES]) for i in range(0, len(data), PIECE_BYTES)]
        fields["files"][name] = {"nbytes": len(data), "sha256": digests}
        manifest = json.dumps(fields).encode()
        (folder / MANIFEST_NAME).write_bytes(manifest)
    (folder / CHECKSUM_NAME).write_bytes(checksum_file(manifest))


def refused(path: Path) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        load_everything(path)
    return caught.value

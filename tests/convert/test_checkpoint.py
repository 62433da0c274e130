"""A packed checkpoint gives back exactly what went in."""

import os

import numpy as np
import pytest

from qwen3_moe_jax.convert import checkpoint_source
from qwen3_moe_jax.convert.checkpoint_writer import checkpoint_nbytes, write_checkpoint
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.manifest import (
    MANIFEST_NAME,
    Manifest,
    piece_digest,
)
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.progress import format_bytes
from qwen3_moe_jax.testing.random_models import write_random_gguf


def test_checkpoint_gives_the_arrays_of_the_file(small_gguf, small_checkpoint):
    with open_model(small_gguf) as file, open_model(small_checkpoint) as checkpoint:
        assert checkpoint.config == file.config
        assert checkpoint.metadata == file.metadata
        assert checkpoint.types == file.types
        assert checkpoint.paths() == file.paths()
        for path in file.paths():
            want, got = file.tensor(path), checkpoint.tensor(path)
            assert (got.type, got.shape, got.layout) == (want.type, want.shape, want.layout)
            assert list(got.arrays) == list(want.arrays)
            for name, array in want.arrays.items():
                assert got.arrays[name].dtype == array.dtype
                assert got.arrays[name].ctypes.data % 64 == 0
                assert np.array_equal(got.arrays[name].view(np.uint8), array.view(np.uint8)), (path, name)


def test_orbax_restores_the_same_arrays(small_gguf, small_checkpoint):
    import orbax.checkpoint as ocp

    restored = ocp.PyTreeCheckpointer().restore(small_checkpoint / "tensors" / "layers.1")
    with open_model(small_gguf) as source:
        for path in (p for p in source.paths() if p.startswith("layers.1.")):
            node = restored
            for part in path.split(".")[2:]:
                node = node[part]
            for name, array in source.tensor(path).arrays.items():
                assert np.array_equal(np.asarray(node[name]).view(np.uint8), array.view(np.uint8)), (
                    path,
                    name,
                )


def test_pieces_are_joined_right(small_gguf, tmp_path, monkeypatch):
    """With pieces of 1,000 bytes every array takes many."""
    for module in ("manifest", "checkpoint_source"):
        monkeypatch.setattr(f"qwen3_moe_jax.convert.{module}.PIECE_BYTES", 1000)
    with open_model(small_gguf) as source:
        write_checkpoint(source, tmp_path / "out")
        with open_model(tmp_path / "out") as checkpoint:
            got, want = checkpoint.tensor("embed_tokens"), source.tensor("embed_tokens")
    for name, array in want.arrays.items():
        assert np.array_equal(got.arrays[name].view(np.uint8), array.view(np.uint8))


@pytest.fixture
def in_small_pieces(small_gguf, tmp_path, monkeypatch):
    """A checkpoint whose pieces have 1,000 bytes, and the list of bytes that are read of it."""
    for module in ("manifest", "checkpoint_source"):
        monkeypatch.setattr(f"qwen3_moe_jax.convert.{module}.PIECE_BYTES", 1000)
    with open_model(small_gguf) as source:
        write_checkpoint(source, tmp_path / "out")
    read, read_into = [], checkpoint_source._OpenFile.read_into

    def counted(self, piece, start):
        read.append((self.name, start, len(piece)))
        read_into(self, piece, start)

    with open_model(tmp_path / "out") as checkpoint:
        monkeypatch.setattr(checkpoint_source._OpenFile, "read_into", counted)
        yield checkpoint, read


BOXES = {
    "embed_tokens": lambda n, k: ((n // 2, n), (0, k)),
    "layers.1.self_attn.q_proj": lambda n, k: ((3, n // 3), (0, k)),
    "layers.1.mlp.experts.up_proj": lambda e, n, k: ((e // 2, e), (n // 2, n), (0, k)),
    "layers.0.mlp.experts.gate_proj": lambda e, n, k: ((e // 2, e), (0, n), (0, k)),
    "norm": lambda n: ((n // 2, n),),
}


@pytest.mark.parametrize("path", BOXES)
def test_a_part_reads_its_own_pieces_alone(in_small_pieces, small_gguf, path):
    checkpoint, read = in_small_pieces
    box = BOXES[path](*checkpoint.specs[path].shape)
    part = checkpoint.part(path, box)
    with open_model(small_gguf) as source:
        want = source.tensor(path).part(box)
    for name, array in want.arrays.items():
        assert np.array_equal(part.arrays[name], array), name
    assert len(set(read)) == len(read)  # none twice
    if path != "norm":  # a run of rows begins and ends in the middle of a piece
        runs = box[0][1] - box[0][0] if len(box) == 3 else 1
        assert sum(n for *_, n in read) <= part.nbytes + 2 * 1000 * runs * len(part.arrays)
        assert sum(n for *_, n in read) < checkpoint.tensor_nbytes(path)


def test_damage_is_found_in_the_parts_that_have_it(in_small_pieces, tmp_path):
    checkpoint, _ = in_small_pieces
    path = "layers.0.mlp.experts.up_proj"
    experts, *whole = ((0, size) for size in checkpoint.specs[path].shape)
    names = checkpoint_source.array_files(path, checkpoint.types[path], checkpoint.specs[path].shape)
    file = tmp_path / "out" / next(iter(names.values()))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # of the last expert
    file.write_bytes(data)
    middle = experts[1] // 2
    checkpoint.part(path, ((0, middle), *whole))
    with pytest.raises(ModelFileError, match="differs from its SHA-256"):
        checkpoint.part(path, ((middle, experts[1]), *whole))


def test_checkpoint_of_a_checkpoint_is_the_same(small_checkpoint, tmp_path):
    with open_model(small_checkpoint) as source:
        write_checkpoint(source, tmp_path / "again")
        with open_model(tmp_path / "again") as again:
            assert again.metadata == source.metadata
            assert again.types == source.types


def test_closing_twice_closes_no_file_of_another(small_checkpoint):
    source = open_model(small_checkpoint)
    source.close()
    other = os.open(os.devnull, os.O_RDONLY)  # takes the number
    try:
        source.close()
        os.fstat(other)
    finally:
        os.close(other)


def test_identity_and_sha256(small_checkpoint, copy, tmp_path, small_config):
    with open_model(small_checkpoint) as first, open_model(copy) as second:
        assert first.identity == second.identity
        assert first.sha256() == second.sha256() == piece_digest((copy / MANIFEST_NAME).read_bytes())
    write_random_gguf(tmp_path / "other.gguf", small_config, seed=2)
    with open_model(tmp_path / "other.gguf") as source:
        write_checkpoint(source, tmp_path / "other")
    with open_model(tmp_path / "other") as other:
        assert other.identity != first.identity


def test_size_estimate_holds(small_gguf, small_checkpoint):
    taken = sum(f.stat().st_blocks * 512 for f in small_checkpoint.rglob("*"))
    with open_model(small_gguf) as source:
        assert taken <= checkpoint_nbytes(source)


def test_progress_reaches_the_total(small_gguf, tmp_path):
    calls = []
    with open_model(small_gguf) as source:
        total = write_checkpoint(
            source, tmp_path / "out", progress=lambda done, total: calls.append((done, total))
        )
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_manifest_survives_its_own_form(small_checkpoint):
    data = (small_checkpoint / MANIFEST_NAME).read_bytes()
    assert Manifest.from_json(data).to_json() == data


def test_sizes_for_people():
    assert [format_bytes(n) for n in (18_557_000_000, 14_200_000)] == ["18.56 GB", "14.2 MB"]

"""A packed checkpoint gives back exactly what went in."""

import os

import numpy as np

from qwen3_moe_jax.convert.checkpoint_writer import checkpoint_nbytes, write_checkpoint
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

"""A model in several GGUF files: opened from any of them, refused where one is not what it should be."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.testing.gguf_builder import (
    BOOL,
    I32,
    U16,
    U64,
    GGUFBuilder,
    Typed,
    model_builder,
)
from tests.convert.gguf_files import refusal, sound_shards, write_shards


@pytest.mark.parametrize("opened", [0, 1, 2])
@pytest.mark.parametrize("name", ["m", "", "a b-00001-of-00002.gguf", "ü\n"])
def test_split_model_opens_from_any_shard(tmp_path: Path, opened: int, name: str):
    paths = write_shards(tmp_path, sound_shards(), name)
    with GGUFFile.open(paths[opened]) as file:
        assert list(file.tensors) == ["t0.0", "t0.1", "t1.0", "t1.1", "t2.0", "t2.1"]
        assert [t.shard for t in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
        assert all(file.read(t).tobytes().decode().strip() == t.name for t in file.tensors.values())
        assert file.metadata["only.in.first"] == 1
        assert file.paths == paths
        assert file.nbytes == sum(p.stat().st_size for p in paths)


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = write_shards(tmp_path, sound_shards())
    monkeypatch.chdir(tmp_path)
    with GGUFFile.open(paths[0].name) as file:
        assert len(file.tensors) == 6


def keyless_shards(folder: Path) -> list[Path]:
    """A whole model in two files, as a tool that knows no split keys would cut it."""
    whole = model_builder()
    half = len(whole.tensors) // 2
    shards = [GGUFBuilder(whole.metadata, whole.tensors[:half]), GGUFBuilder({}, whole.tensors[half:])]
    return write_shards(folder, shards)


@pytest.mark.parametrize("opened", [0, 1])
def test_a_shard_without_split_keys_is_named(tmp_path: Path, opened: int):
    path = keyless_shards(tmp_path)[opened]
    with pytest.raises(ModelFileError, match=f"shard {opened + 1} of 2, and has no split keys") as caught:
        open_model(path)
    assert caught.value.code == "E_SPLIT"
    assert caught.value.advice == "put all shards of one model into one folder"


def test_a_whole_model_may_have_the_name_of_a_shard(tmp_path: Path):
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(model_builder().build())
    open_model(path).close()


@pytest.mark.parametrize("name", ["m.gguf.part1of2", "m.gguf-split-a", "m.gguf.part-aa", "m.gguf.part2"])
@pytest.mark.parametrize("half", [slice(0, 900), slice(900, None)], ids=["first", "second"])
def test_a_piece_of_a_cut_file_is_named(tmp_path: Path, name: str, half: slice):
    (tmp_path / name).write_bytes(model_builder().build()[half])
    with pytest.raises(ModelFileError, match="one piece of a file that was cut: join all pieces"):
        open_model(tmp_path / name)


@pytest.mark.parametrize("count", [0, 1])
def test_split_count_of_one_is_a_whole_file(write: Callable[..., Path], count: int):
    with GGUFFile.open(write(GGUFBuilder({"split.count": Typed(U16, count)}))) as file:
        assert len(file.paths) == 1


def missing(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[1].unlink()


def reordered(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[1].write_bytes(shards[2].build())
    paths[2].write_bytes(shards[1].build())


def duplicate(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[2].write_bytes(shards[1].build())


def duplicate_by_link(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[2].unlink()
    paths[2].symlink_to(paths[1])


def is_a_folder(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    paths[1].unlink()
    paths[1].mkdir()


def rewritten(index: int, **metadata: object) -> Callable[[list[GGUFBuilder], list[Path]], None]:
    """One shard with other ``split.*`` values; None takes the key away."""

    def change(shards: list[GGUFBuilder], paths: list[Path]) -> None:
        for name, value in metadata.items():
            shards[index].metadata["split." + name.replace("_", ".")] = value
        shards[index].metadata = {k: v for k, v in shards[index].metadata.items() if v is not None}
        paths[index].write_bytes(shards[index].build())

    return change


def same_tensor_twice(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    shards[2].tensors[0].name = "t0.0"
    paths[2].write_bytes(shards[2].build())


def tensor_lost(shards: list[GGUFBuilder], paths: list[Path]) -> None:
    shards[2].tensors.pop()
    paths[2].write_bytes(shards[2].build())


SPLIT_FAULTS = {
    "missing": (missing, "m-00002-of-00003.gguf: cannot be opened"),
    "reordered": (reordered, "holds shard 3 of 3, not shard 2 of 3"),
    "duplicate": (duplicate, "holds shard 2 of 3, not shard 3 of 3"),
    "duplicate by link": (duplicate_by_link, "holds shard 2 of 3, not shard 3 of 3"),
    "is a folder": (is_a_folder, "is a folder"),
    "same tensor twice": (same_tensor_twice, "has tensor 't0.0', as another shard does"),
    "tensor lost": (tensor_lost, "they hold 5"),
    "number of another": (rewritten(1, no=0), "holds shard 1 of 3"),
    "another count": (rewritten(1, count=4), "holds shard 2 of 4"),
    "not a shard": (rewritten(1, count=None), "split.count is missing"),
    "number is a text": (rewritten(0, no="0"), "split.no is missing or not a number"),
    "number is missing": (rewritten(0, no=None), "split.no is missing or not a number"),
    "number is negative": (rewritten(0, no=Typed(I32, -1)), "split.no is missing or not a number"),
    "count is a text": (rewritten(0, count="../../x"), "split.count is missing or not a number"),
    "count is a list": (rewritten(0, count=[3]), "split.count is missing or not a number"),
    "count is true": (rewritten(0, count=Typed(BOOL, True)), "split.count is missing or not a number"),
    "count is huge": (rewritten(0, count=Typed(U64, 2**64 - 1)), "at most 512"),
    "count in the name differs": (rewritten(0, count=2), "must end in -00001-of-00002.gguf"),
    "number in the name differs": (rewritten(0, no=1), "must end in -00002-of-00003.gguf"),
    "tensor count is missing": (rewritten(2, tensors_count=None), "split.tensors.count is missing"),
    "tensor count is wrong": (rewritten(0, tensors_count=Typed(I32, 7)), "hold 7 tensors; they hold 6"),
}


@pytest.mark.parametrize("fault", SPLIT_FAULTS)
def test_split_fault(tmp_path: Path, fault: str):
    change, message = SPLIT_FAULTS[fault]
    shards = sound_shards()
    paths = write_shards(tmp_path, shards)
    change(shards, paths)
    error = refusal(paths[0])
    assert error.code == "E_SPLIT"
    assert message in str(error)


def test_renamed_shard(tmp_path: Path):
    paths = write_shards(tmp_path, sound_shards())
    renamed = paths[0].rename(tmp_path / "model.gguf")
    assert "its name must end in -00001-of-00003.gguf" in str(refusal(renamed))


def test_fault_inside_a_shard_keeps_its_code(tmp_path: Path):
    paths = write_shards(tmp_path, sound_shards())
    os.truncate(paths[2], paths[2].stat().st_size - 40)
    error = refusal(paths[0])
    assert error.code == "E_SHORT_READ"
    assert "m-00003-of-00003.gguf" in str(error)

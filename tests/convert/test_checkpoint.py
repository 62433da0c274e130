"""A packed checkpoint gives back exactly what went in, and refuses what is damaged or hostile."""

import errno
import json
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen3_moe_jax.cli import main
from qwen3_moe_jax.convert.checkpoint_source import array_files
from qwen3_moe_jax.convert.checkpoint_writer import checkpoint_nbytes, write_checkpoint
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    PIECE_BYTES,
    Manifest,
    checksum_file,
    piece_digest,
)
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.output_folder import OutputError, output_folder
from qwen3_moe_jax.convert.packed import array_nbytes
from qwen3_moe_jax.convert.progress import format_bytes
from qwen3_moe_jax.testing.random_models import write_random_gguf

NUM_FLIPS = 150
DOWN = "layers.1.mlp.experts.down_proj"


def load_everything(path: Path) -> None:
    with open_model(path) as source:
        for _ in source.tensors():
            pass


@pytest.fixture
def copy(small_checkpoint, tmp_path) -> Path:
    """A checkpoint of the test's own, to be damaged."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "copy"))


@pytest.fixture
def data_file(copy) -> Path:
    """The file of the largest array of one tensor."""
    with open_model(copy) as source:
        return copy / next(iter(array_files(DOWN, source.types[DOWN], source.specs[DOWN].shape).values()))


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


# What went in comes out


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


# Damage


def test_every_flipped_bit_is_found(copy):
    """Single bits, spread over all files; the manifest and its checksum get some of them for sure."""
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    files = sorted(f for f in copy.rglob("*") if f.is_file())
    always = [copy / MANIFEST_NAME, copy / CHECKSUM_NAME, copy / "metadata.json"]
    targets = always * 5 + [rng.choice(files) for _ in range(NUM_FLIPS - 5 * len(always))]
    for file in targets:
        data = bytearray(file.read_bytes())
        bit = rng.randrange(8 * len(data))
        flip_bit(file, bit)
        try:
            load_everything(copy)
        except ModelFileError:
            file.write_bytes(data)
        else:
            pytest.fail(f"seed {seed}: bit {bit} of {file.relative_to(copy)} was not noticed")
    load_everything(copy)


def flip_bit(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_case_of_the_checksum_matters(copy):
    """Bit 5 of a hexadecimal letter is its case: a reader that ignores case would miss that flip."""
    text = (copy / CHECKSUM_NAME).read_text()
    (copy / CHECKSUM_NAME).write_text(text.upper())
    assert refused(copy).code == "E_CHECKPOINT"


@pytest.mark.parametrize("change", [-1, 1])
def test_file_of_another_size_is_refused_before_memory_is_taken(copy, data_file, change, monkeypatch):
    os.truncate(data_file, data_file.stat().st_size + change)
    with open_model(copy) as source:
        monkeypatch.setattr(
            "qwen3_moe_jax.convert.checkpoint_source.empty_packed", lambda *_: pytest.fail("allocated")
        )
        with pytest.raises(ModelFileError, match="bytes"):
            source.tensor(DOWN)


@pytest.mark.parametrize("name", [MANIFEST_NAME, CHECKSUM_NAME, "metadata.json", "tensors"])
def test_missing_file_is_refused(copy, name):
    (shutil.rmtree if name == "tensors" else os.unlink)(copy / name)
    assert refused(copy).code == "E_CHECKPOINT"


def test_unverified_loading_skips_the_digests_and_keeps_the_sizes(copy, data_file):
    flip_bit(data_file, 12345)
    with open_model(copy, check=False) as source:
        source.tensor(DOWN)
        os.truncate(data_file, 100)
        with pytest.raises(ModelFileError):
            source.tensor(DOWN)


def test_error_names_the_file(copy, data_file):
    flip_bit(data_file, 12345)
    error = refused(copy)
    assert error.code == "E_CHECKPOINT"
    assert error.name == data_file.relative_to(copy).as_posix()
    assert "convert the .gguf again" in str(error)


# Hostile content, with all digests right


def hostile_manifest(edit: Callable[[dict], object]) -> Callable[[Path, Path], None]:
    return lambda folder, data_file: edit_json(folder, MANIFEST_NAME, edit)


def hostile_metadata(edit: Callable[[dict], object]) -> Callable[[Path, Path], None]:
    return lambda folder, data_file: edit_json(folder, "metadata.json", edit)


def replaced_by_link(folder: Path, data_file: Path) -> None:
    outside = folder.parent / "outside"
    shutil.move(data_file, outside)
    data_file.symlink_to(outside)


def folder_replaced_by_link(folder: Path, data_file: Path) -> None:
    shutil.move(data_file.parent, folder.parent / "outside")
    data_file.parent.symlink_to(folder.parent / "outside")


def manifest_replaced_by_link(folder: Path, data_file: Path) -> None:
    shutil.move(folder / MANIFEST_NAME, folder.parent / "outside")
    (folder / MANIFEST_NAME).symlink_to(folder.parent / "outside")


def replaced_by_fifo(folder: Path, data_file: Path) -> None:
    data_file.unlink()
    os.mkfifo(data_file)


def replaced_by_folder(folder: Path, data_file: Path) -> None:
    data_file.unlink()
    data_file.mkdir()


def nan_scale(folder: Path, data_file: Path) -> None:
    with open_model(folder) as source:
        path = next(p for p, kind in source.types.items() if kind.name == "Q6_K")
        name = array_files(path, source.types[path], source.specs[path].shape)["d"]
    data = bytearray((folder / name).read_bytes())
    data[-2:] = b"\x00\x7e"
    sign(folder, name, bytes(data))


def key_of_a_real_file_outside(folder: Path, data_file: Path) -> None:
    (folder.parent / "outside").write_bytes(b"secret")
    record = {"nbytes": 6, "sha256": [piece_digest(b"secret")]}
    name = "tensors/layers.0/../../../outside"
    assert (folder / name).exists()
    edit_json(folder, MANIFEST_NAME, lambda m: m["files"].update({name: record}))


def whole_norm_of_a_quantized_type(folder: Path, data_file: Path) -> None:
    sizes = array_nbytes(GGMLType.Q8_0, (256,))
    for array, name in array_files("norm", GGMLType.Q8_0, (256,)).items():
        (folder / name).parent.mkdir()
        sign(folder, name, bytes(sizes[array]))
    edit_json(folder, MANIFEST_NAME, lambda m: m["types"].update(norm="Q8_0"))


def files_key(name: str) -> Callable[[dict], object]:
    digest = {"nbytes": 0, "sha256": []}
    return lambda manifest: manifest["files"].update({name: digest})


def first_file(**fields: object) -> Callable[[dict], object]:
    return lambda manifest: next(iter(manifest["files"].values())).update(fields)


HOSTILE = {
    "absolute key": hostile_manifest(files_key("/etc/passwd")),
    "key of a real file outside": key_of_a_real_file_outside,
    "whole norm of a quantized type": whole_norm_of_a_quantized_type,
    "key with dots": hostile_manifest(files_key("tensors/layers.0/../../../../etc/passwd")),
    "key with dots inside tensors": hostile_manifest(files_key("tensors/../metadata.json")),
    "empty part in a key": hostile_manifest(files_key("tensors//etc/passwd")),
    "unknown item": hostile_manifest(files_key("tensors/layers.99/_METADATA")),
    "unknown top file": hostile_manifest(files_key("setup.py")),
    "link for an array": replaced_by_link,
    "link for a folder": folder_replaced_by_link,
    "link for the manifest": manifest_replaced_by_link,
    "FIFO for an array": replaced_by_fifo,
    "folder for an array": replaced_by_folder,
    "NaN scale": nan_scale,
    "huge vocabulary": hostile_manifest(lambda m: m["config"].update(vocab_size=2**20)),
    "vocabulary beyond all limits": hostile_manifest(lambda m: m["config"].update(vocab_size=10**30)),
    "huge width": hostile_metadata(lambda m: m.update({"qwen3moe.embedding_length": 2**16})),
    "width of text": hostile_metadata(lambda m: m.update({"qwen3moe.embedding_length": "256"})),
    "nested metadata": hostile_metadata(lambda m: m.update({"a": {"b": 1}})),
    "nested list in metadata": hostile_metadata(lambda m: m.update({"a": [[1]]})),
    "other architecture": hostile_metadata(lambda m: m.update({"general.architecture": "llama"})),
    "config that differs": hostile_manifest(lambda m: m["config"].update(rope_theta=1.0)),
    "tied is text": hostile_manifest(lambda m: m["config"].update(tie_word_embeddings="no")),
    "huge file size": hostile_manifest(first_file(nbytes=2**62)),
    "negative file size": hostile_manifest(first_file(nbytes=-1)),
    "boolean file size": hostile_manifest(first_file(nbytes=True)),
    "digest of another form": hostile_manifest(first_file(sha256=["../../etc/passwd"])),
    "digests of another form": hostile_manifest(first_file(sha256={"a": 1})),
    "type of the array's folder": hostile_manifest(lambda m: m["types"].update({DOWN: "../Q4_K"})),
    "type that is a list": hostile_manifest(lambda m: m["types"].update({DOWN: ["Q4_K"]})),
    "type of another size": hostile_manifest(lambda m: m["types"].update({DOWN: "F32"})),
    "norm of a quantized type": hostile_manifest(lambda m: m["types"].update({"norm": "Q4_K"})),
    "missing tensor": hostile_manifest(lambda m: m["types"].pop(DOWN) and None),
    "extra tensor": hostile_manifest(lambda m: m["types"].update({"layers.0.evil": "F32"})),
    "small pieces": hostile_manifest(lambda m: m.update(piece_nbytes=1)),
    "later version": hostile_manifest(lambda m: m.update(version=2)),
    "later layout": hostile_manifest(lambda m: m.update(layout_version=99)),
    "version of text": hostile_manifest(lambda m: m.update(version="1\n\x1b[31m")),
    "other format": hostile_manifest(lambda m: m.update(format="zip")),
    "unknown field": hostile_manifest(lambda m: m.update(script="rm -rf /")),
    "files as a list": hostile_manifest(lambda m: m.update(files=[])),
    "list for a manifest": hostile_manifest(lambda m: [m]),
    "deep nesting": lambda folder, _: sign(folder, MANIFEST_NAME, b"[" * 100_000),
    "no JSON": lambda folder, _: sign(folder, MANIFEST_NAME, b"cos\nsystem\n(S'true'\ntR."),
    "no UTF-8": lambda folder, _: sign(folder, MANIFEST_NAME, b'{"\xff\xfe": 1}'),
    "number of many digits": lambda folder, _: sign(
        folder, MANIFEST_NAME, b'{"version": ' + b"9" * 10_000 + b"}"
    ),
    "manifest larger than any": lambda folder, _: os.truncate(folder / MANIFEST_NAME, 1 << 40),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoint_is_refused(copy, data_file, name):
    HOSTILE[name](copy, data_file)
    error = refused(copy)
    assert str(error).isprintable()
    assert error.code == {"NaN scale": "E_NONFINITE", "other architecture": "E_ARCH"}.get(name, error.code)


def test_link_to_a_whole_checkpoint_is_fine(small_checkpoint, tmp_path):
    """The path that a person gives may be a link; what is inside may not."""
    (tmp_path / "link").symlink_to(small_checkpoint)
    load_everything(tmp_path / "link")


def test_manifest_survives_its_own_form(small_checkpoint):
    data = (small_checkpoint / MANIFEST_NAME).read_bytes()
    assert Manifest.from_json(data).to_json() == data


# The command


def run(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str]:
    code = main(["convert", *map(str, argv)])
    return code, capsys.readouterr().err


def test_command_converts(small_gguf, tmp_path, capsys):
    assert main(["convert", str(small_gguf), str(tmp_path / "out")]) == 0
    assert "MB in" in capsys.readouterr().out
    load_everything(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_command_refuses_what_is_there(small_gguf, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        code, err = run(capsys, small_gguf, tmp_path / name)
        assert (code, "E_EXISTS" in err, err.count("\n")) == (5, True, 1)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "link"]


def test_command_fills_an_empty_folder(small_gguf, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert run(capsys, small_gguf, f"{tmp_path}/out/")[0] == 0
    load_everything(tmp_path / "out")


def test_command_needs_the_model_and_the_parent_folder(small_gguf, tmp_path, capsys):
    code, err = run(capsys, tmp_path / "absent.gguf", tmp_path / "out")
    assert (code, "E_OPEN" in err, err.count("\n")) == (1, True, 1)
    code, err = run(capsys, small_gguf, tmp_path / "absent" / "out")
    assert (code, "there is no folder" in err, err.count("\n")) == (6, True, 1)
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_a_type_that_is_not_supported(small_gguf, tmp_path, capsys):
    model = tmp_path / "model.gguf"
    data = small_gguf.read_bytes()
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8
    model.write_bytes(data[:at] + (24).to_bytes(4, "little") + data[at + 4 :])
    code, err = run(capsys, model, tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert not (tmp_path / "out").exists()


def test_command_says_that_the_disk_is_too_small(small_gguf, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "qwen3_moe_jax.convert.output_folder.shutil.disk_usage", lambda _: usage(0, 0, 1_000_000)
    )
    code, err = run(capsys, small_gguf, tmp_path / "out")
    assert (code, "E_DISK_FULL" in err, "1000000 free" in err) == (6, True, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_command_says_that_the_disk_is_read_only(small_gguf, tmp_path, capsys, monkeypatch, number):
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_CREAT and str(tmp_path) in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    code, err = run(capsys, small_gguf, tmp_path / "out")
    assert (code, "E_READ_ONLY" in err) == (6, True)
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_a_nan_and_leaves_nothing(tmp_path, small_config, capsys):
    model = tmp_path / "model.gguf"
    write_random_gguf(model, small_config, mix="f32")
    size = model.stat().st_size
    with open(model, "r+b") as file:
        file.seek(size - 4)
        file.write(b"\x00\x00\xc0\x7f")
    code, err = run(capsys, model, tmp_path / "out")
    assert (code, "E_NONFINITE" in err, "row 271, column 255" in err) == (1, True, True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_lock_is_held_until_the_end(tmp_path):
    with output_folder(tmp_path / "out", 1) as folder:
        (folder / "file").write_text("x")
        with pytest.raises(OutputError, match="E_BUSY"), output_folder(tmp_path / "out", 1):
            pytest.fail("two writers")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Progress


def test_sizes_for_people():
    assert [format_bytes(n) for n in (18_557_000_000, 14_200_000)] == ["18.56 GB", "14.2 MB"]

"""A damaged or hostile checkpoint is refused."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.checkpoint_source import array_files
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    piece_digest,
)
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import array_nbytes
from tests.convert.checkpoints import DOWN, edit_json, load_everything, refused, sign

NUM_FLIPS = 150


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

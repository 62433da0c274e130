"""Reading a GGUF file tensor by tensor gives what is in it, checked, under every type."""

import hashlib
import os
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.unpack import ALIGNMENT, dequantize, pack
from qwen3_moe_jax.testing.random_models import WEIGHT_STD, random_blocks, write_random_gguf
from scripts.make_random_gguf import main


def poison(path, name: str, block: int, field_name: str) -> None:
    """Writes an infinity into one field of one block of a tensor, in place."""
    with GGUFFile.open(path) as file:
        info = file.tensors[name]
    fmt = BLOCK_FORMATS[info.type]
    field = fmt.fields[field_name]
    bits = {"<f2": b"\x00\x7c", "<u2": b"\x80\x7f", "<f4": b"\x00\x00\x80\x7f"}[field.dtype]
    with open(path, "r+b") as file:
        file.seek(info.offset + block * fmt.nbytes + field.offset)
        file.write(bits)


def test_every_type_is_in_the_mixed_model(small_gguf):
    with open_model(small_gguf) as source:
        assert set(source.types.values()) == set(SUPPORTED_TYPES)


def test_tensors_are_bit_for_bit_those_of_the_gguf_package(small_gguf):
    oracle = {tensor.name: tensor for tensor in gguf.GGUFReader(small_gguf).tensors}
    with open_model(small_gguf) as source:
        for path, tensor in source.tensors():
            spec = source.specs[path]
            want = oracle[spec.gguf_name]
            assert tensor.type == want.tensor_type == source.types[path]
            assert tensor.shape == spec.shape
            weights = np.asarray(gguf.dequantize(want.data, want.tensor_type), np.float32)
            got = dequantize(tensor)
            assert np.array_equal(got.view(np.uint32), weights.reshape(got.shape).view(np.uint32)), path


@pytest.mark.parametrize("piece_bytes", [300, 10_000, 1 << 22])
def test_pieces_do_not_matter(small_gguf, monkeypatch, piece_bytes):
    monkeypatch.setattr("qwen3_moe_jax.convert.gguf_source.READ_PIECE_BYTES", piece_bytes)
    with GGUFFile.open(small_gguf) as file, open_model(small_gguf) as source:
        for path in ("embed_tokens", "layers.1.mlp.experts.down_proj", "layers.0.mlp.router", "norm"):
            info = file.tensors[source.specs[path].gguf_name]
            want = pack(file.read(info), info.type, info.shape)
            got = source.tensor(path)
            for name, array in want.arrays.items():
                assert np.array_equal(got.arrays[name].view(np.uint8), array.view(np.uint8)), (path, name)
                assert got.arrays[name].ctypes.data % ALIGNMENT == 0


def test_config_metadata_and_paths(small_gguf, small_config):
    with open_model(small_gguf) as source:
        assert source.config == replace(small_config, rms_norm_eps=source.config.rms_norm_eps)
        assert source.config.rms_norm_eps == pytest.approx(small_config.rms_norm_eps)
        assert source.metadata["tokenizer.ggml.pre"] == "qwen2"
        assert source.paths()[0] == "embed_tokens"
        assert source.paths()[-1] == "lm_head"
        assert source.nbytes == sum(source.tensor_nbytes(path) for path in source.paths())
        with pytest.raises(KeyError):
            source.tensor("layers.3.mlp.router")


def test_tied_model_has_no_lm_head(tmp_path, small_config):
    path = tmp_path / "tied.gguf"
    write_random_gguf(path, replace(small_config, tie_word_embeddings=True))
    with open_model(path) as source:
        assert source.config.tie_word_embeddings
        assert "lm_head" not in source.paths()


def test_identity_is_stable_and_follows_the_content(small_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copy2(small_gguf, path)
    with open_model(path) as first, open_model(small_gguf) as second:
        assert first.identity == second.identity
    os.utime(path, (1, 1))
    with open_model(path) as touched:
        assert touched.identity != second.identity
        assert touched.sha256() == hashlib.sha256(small_gguf.read_bytes()).hexdigest()


def test_progress_reaches_the_total(small_gguf):
    calls = []
    with open_model(small_gguf) as source:
        for _ in source.tensors(lambda done, total: calls.append((done, total))):
            pass
        assert calls == sorted(calls)
        assert calls[-1] == (source.nbytes, source.nbytes)


@pytest.mark.parametrize("piece_bytes", [1000, 1 << 22])
@pytest.mark.parametrize(
    ("path", "block", "field", "where"),
    [
        ("layers.0.mlp.experts.up_proj", 0, None, "expert 0, row 0"),
        ("layers.0.mlp.experts.up_proj", -1, None, "expert 2, row 255"),
        ("layers.1.mlp.experts.down_proj", 256 + 7, None, "expert 1, row 7"),
        ("norm", 3, "w", "column 3"),
    ],
)
def test_nonfinite_number_is_refused_by_default(
    small_config, tmp_path, monkeypatch, path, block, field, where, piece_bytes
):
    monkeypatch.setattr("qwen3_moe_jax.convert.gguf_source.READ_PIECE_BYTES", piece_bytes)
    model = tmp_path / "model.gguf"
    types = dict.fromkeys(("layers.0.mlp.experts.up_proj", "layers.1.mlp.experts.down_proj"), GGMLType.Q4_K)
    write_random_gguf(model, small_config, types=types)
    with open_model(model) as source:
        spec = source.specs[path]
    blocks = int(np.prod(spec.shape)) // (256 if field is None else 1)
    poison(model, spec.gguf_name, block % blocks, field or "dmin")
    with open_model(model) as source, pytest.raises(ModelFileError) as caught:
        source.tensor(path)
    assert caught.value.code == "E_NONFINITE"
    assert caught.value.name == spec.gguf_name
    assert where in str(caught.value)
    with open_model(model, check=False) as source:
        assert not np.isfinite(dequantize(source.tensor(path))).all()


def test_file_that_changes_while_it_is_read_is_refused(small_gguf, tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copy(small_gguf, path)
    with open_model(path) as source:
        os.truncate(path, path.stat().st_size - 5000)
        with pytest.raises(ModelFileError) as caught:
            source.tensor("lm_head")
    assert caught.value.code in ("E_SHORT_READ", "E_CHANGED")


def test_missing_file_and_folder_without_manifest_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="E_OPEN"):
        open_model(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError, match=r"E_CHECKPOINT.*not a packed checkpoint"):
        open_model(tmp_path)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_random_blocks_have_the_wanted_spread(kind):
    fmt = BLOCK_FORMATS[kind]
    count = (1 << 18) // fmt.weights
    raw = random_blocks(kind, count, np.random.default_rng(3))
    weights = dequantize(pack(raw.reshape(-1), kind, (count, fmt.weights)))
    # Scales are uniform in [20, 60): their root mean square is 4 % above the mean that the formula uses.
    assert weights.std() == pytest.approx(WEIGHT_STD, rel=0.06)
    assert abs(weights.mean()) < 0.05 * WEIGHT_STD


def test_random_model_script_is_deterministic_and_copies_a_tokenizer(tmp_path, small_gguf):
    sizes = (
        "--layers 1 --hidden 256 --heads 2 --kv 1 --head-dim 64 --experts 2 --experts-per-token 1 --ff 256"
    )
    argv = [*sizes.split(), "--vocab", str(small_gguf), "--mix", "q6_k"]
    for name in ("a", "b"):
        main([str(tmp_path / name), *argv])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with open_model(tmp_path / "a") as copy, open_model(small_gguf) as original:
        assert copy.config.vocab_size == original.config.vocab_size
        assert copy.types["layers.0.self_attn.q_proj"] == GGMLType.Q6_K
        for key, value in original.metadata.items():
            if key.startswith("tokenizer."):
                assert copy.metadata[key] == value

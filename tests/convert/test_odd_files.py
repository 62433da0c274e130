"""Files that are right and unusual: fused tensors, text in other encodings, widths that are not said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.fused import FUSED
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.testing.gguf_builder import (
    TINY,
    GGUFBuilder,
    Tensor,
    entry,
    model_builder,
    text,
    tokenizer_metadata,
)
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

STRING = 8
CONFIG = replace(SMALL, num_hidden_layers=1)
TYPES = {f"layers.0.self_attn.{name}_proj": GGMLType.IQ4_XS for name in "qkv"}
TYPES |= {f"layers.0.mlp.experts.{name}_proj": GGMLType.IQ2_S for name in ("gate", "up")}


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "separate.gguf"
    write_random_gguf(path, CONFIG, types=TYPES, seed=5)
    return path


def fuse(path: Path, to: Path, which: str, parts: tuple[str, ...]) -> None:
    """Writes a model's file with some tensors of its layer in one."""
    with GGUFFile.open(path) as file:
        tensors: dict[str, Tensor] = {}
        for info in file.tensors.values():
            tensors[info.name] = Tensor(info.name, info.shape, info.type_id, file.read(info).tobytes())
        builder = GGUFBuilder(dict(file.metadata))
    pieces = [tensors.pop(f"blk.0.{part}.weight") for part in parts]
    outer = int(np.prod(pieces[0].shape[:-2]))
    payload = b"".join(
        piece.payload()[i * len(piece.payload()) // outer : (i + 1) * len(piece.payload()) // outer]
        for i in range(outer)
        for piece in pieces
    )
    *leading, _, columns = pieces[0].shape
    shape = (*leading, sum(piece.shape[-2] for piece in pieces), columns)
    tensors["fused"] = Tensor(f"blk.0.{which}.weight", shape, pieces[0].type, payload)
    builder.metadata |= tokenizer_metadata(CONFIG.vocab_size)
    builder.tensors = list(tensors.values())
    to.write_bytes(builder.build())


@pytest.mark.parametrize("which", FUSED)
def test_parts_of_a_fused_tensor_are_those_of_separate_ones(separate, tmp_path, which, monkeypatch):
    monkeypatch.setattr("qwen3_moe_jax.convert.gguf_source.READ_PIECE_BYTES", 10_000)
    fuse(separate, tmp_path / "fused.gguf", which, FUSED[which])
    with open_model(separate) as want, open_model(tmp_path / "fused.gguf") as found:
        assert found.config == want.config
        assert found.types == want.types
        assert found.nbytes == want.nbytes
        for path in want.paths():
            expected, actual = want.tensor(path), found.tensor(path)
            for name, array in expected.arrays.items():
                assert array.tobytes() == actual.arrays[name].tobytes(), (path, name)


@pytest.mark.parametrize("which", FUSED)
def test_a_fused_tensor_of_another_shape_is_refused_by_its_name(tmp_path, which):
    builder = model_builder()
    names = [f"blk.0.{part}.weight" for part in FUSED[which]]
    builder.tensors = [t for t in builder.tensors if t.name not in names]
    builder.tensors.append(Tensor(f"blk.0.{which}.weight", (8, 32), GGMLType.F32))
    (tmp_path / "bad.gguf").write_bytes(builder.build())
    with pytest.raises(ModelFileError, match=rf"E_TENSOR: 'blk\.0\.{which}\.weight' has shape \[8, 32\]"):
        open_model(tmp_path / "bad.gguf")


def test_text_that_nothing_reads_may_be_in_any_encoding(tmp_path):
    builder = model_builder()
    builder.raw_metadata = [
        entry("general.author", STRING, text("Müller".encode("latin-1"))),
        entry("quantize.imatrix.file", STRING, text(b"/data/\xff.dat")),
        entry("quantize.imatrix.chunks_count", 5, (128).to_bytes(4, "little")),
    ]
    (tmp_path / "odd.gguf").write_bytes(builder.build())
    with open_model(tmp_path / "odd.gguf") as source:
        assert source.metadata["general.author"] == "M\ufffdller"
        assert source.metadata["quantize.imatrix.chunks_count"] == 128
        assert [w.split(" ", 1)[0] for w in source.warnings] == [
            "'general.author'",
            "'quantize.imatrix.file'",
        ]


def test_a_width_of_experts_that_is_not_said_is_named_and_not_the_tensors(tmp_path):
    builder = model_builder()
    del builder.metadata["qwen3moe.expert_feed_forward_length"]
    builder.metadata["qwen3moe.feed_forward_length"] = 3 * TINY.moe_intermediate_size * 2
    (tmp_path / "odd.gguf").write_bytes(builder.build())
    with pytest.raises(ModelFileError, match=r"expert_feed_forward_length is missing.*is 96, not the 32"):
        open_model(tmp_path / "odd.gguf")

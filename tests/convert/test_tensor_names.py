"""The table of tensors: names, shapes and types of real models, and what check_tensors refuses."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.ggml_types import KNOWN_TYPES, SUPPORTED_TYPES, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.tensor_names import check_tensors, q4_k_m_types, tensor_specs, uses_more_bits
from qwen3_moe_jax.testing.gguf_builder import TINY, GGUFBuilder, Tensor, model_tensors

CODER = PRESETS["Qwen3-Coder-30B-A3B"]
LAYER_PATHS = [s.path for s in tensor_specs(TINY) if s.path.startswith("layers.1.")]
GLOBAL_PATHS = ["embed_tokens", "norm", "lm_head"]
PATHS = GLOBAL_PATHS + LAYER_PATHS
NAMES = {s.path: s.gguf_name for s in tensor_specs(TINY)}
MATRICES = [s.path for s in tensor_specs(TINY) if len(s.shape) > 1]


@dataclass
class Model:
    """Tensors of a tiny model that a test changes and then checks through a real file."""

    folder: Path
    config: object = TINY
    tensors: list[Tensor] = field(default_factory=lambda: model_tensors(TINY))

    def find(self, path: str) -> Tensor:
        return next(t for t in self.tensors if t.name == NAMES[path])

    def check(self) -> None:
        path = self.folder / "model.gguf"
        path.write_bytes(GGUFBuilder(tensors=self.tensors).build())
        with GGUFFile.open(path) as file:
            check_tensors(file, self.config)

    def refusal(self) -> ModelFileError:
        with pytest.raises(ModelFileError) as caught:
            self.check()
        assert str(caught.value).isprintable()
        return caught.value


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path)


def test_sound_model(model: Model):
    model.check()


def test_order_in_the_file_does_not_matter(model: Model):
    model.tensors.reverse()
    model.check()


@pytest.mark.parametrize("path", PATHS)
def test_dropped(model: Model, path: str):
    model.tensors.remove(model.find(path))
    error = model.refusal()
    assert (error.code, error.name) == ("E_TENSOR", NAMES[path])
    assert f"1 missing: {NAMES[path]}" in str(error)


@pytest.mark.parametrize("path", PATHS)
def test_renamed(model: Model, path: str):
    model.find(path).name = "other.weight"
    error = model.refusal()
    assert f"1 missing: {NAMES[path]}" in str(error)
    assert "1 extra: other.weight" in str(error)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("axis", [0, -1])
def test_resized(model: Model, path: str, axis: int):
    tensor = model.find(path)
    shape = list(tensor.shape)
    shape[axis] += 32
    expected, tensor.shape = tensor.shape, tuple(shape)
    error = model.refusal()
    assert (error.code, error.name) == ("E_TENSOR", NAMES[path])
    assert f"{NAMES[path]} {shape}, not {list(expected)}" in str(error)


@pytest.mark.parametrize("path", PATHS)
def test_transposed_or_of_another_rank(model: Model, path: str):
    tensor = model.find(path)
    same_size = tensor.shape[::-1] if tensor.shape[0] != tensor.shape[-1] else (*tensor.shape, 1)
    tensor.shape = same_size
    assert model.refusal().name == NAMES[path]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blk.0.attn_qkv.weight", "stands beside"),
        ("blk.1.ffn_gate_up_exps.weight", "stands beside"),
        ("blk.0.attn_q.bias", "no biases"),
        ("blk.1.ffn_gate_inp.bias", "no biases"),
        ("output.bias", "no biases"),
        ("blk.0.attn_q.scale", "scale tensors"),
        ("blk.0.ffn_down_exps.scale", "scale tensors"),
        ("blk.0.ffn_up_exps.input_scale", "scale tensors"),
    ],
)
def test_variants_are_refused_with_their_reason(model: Model, name: str, reason: str):
    model.tensors.append(Tensor(name))
    error = model.refusal()
    assert (error.code, error.name) == ("E_TENSOR", name)
    assert name in str(error)
    assert reason in str(error)


@pytest.mark.parametrize(
    "name", ["blk.2.attn_norm.weight", "blk.0.ffn_gate_shexp.weight", "rope_freqs.weight"]
)
def test_extra(model: Model, name: str):
    model.tensors.append(Tensor(name))
    assert f"1 extra: {name}" in str(model.refusal())


def test_untied_output_in_a_tied_model_is_extra(model: Model):
    model.config = replace(TINY, tie_word_embeddings=True)
    assert "1 extra: output.weight" in str(model.refusal())


def test_many_problems_are_counted_and_the_first_are_named(model: Model):
    model.tensors = [t for t in model.tensors if not t.name.startswith("blk.1")]
    text = str(model.refusal())
    assert "12 missing: blk.1.attn_norm.weight" in text
    assert "and 8 more" in text
    assert len(text) < 400


def test_layers_must_be_as_many_as_declared(model: Model):
    model.config = replace(TINY, num_hidden_layers=3)
    assert "12 missing: blk.2.attn_norm.weight" in str(model.refusal())


@pytest.mark.parametrize("type_id", sorted(KNOWN_TYPES))
@pytest.mark.parametrize("path", ["norm", "layers.1.mlp.experts.down_proj", "lm_head"])
def test_every_type_in_a_norm_and_in_matrices(tmp_path: Path, type_id: int, path: str):
    wide = replace(TINY, hidden_size=256, moe_intermediate_size=256)
    model = Model(tmp_path, wide, model_tensors(wide))
    model.find(path).type = type_id
    allowed = (0, 1, 30) if path == "norm" else SUPPORTED_TYPES
    if type_id in allowed:
        model.check()
        return
    error = model.refusal()
    assert (error.code, error.name) == ("E_QTYPE", NAMES[path])
    assert KNOWN_TYPES[type_id].name in str(error)
    assert "BF16" in str(error)


def test_unsupported_types_are_counted_and_another_file_named(tmp_path: Path):
    wide = replace(TINY, hidden_size=256, moe_intermediate_size=256)
    model = Model(tmp_path, wide, model_tensors(wide))
    wanted = {"embed_tokens": "Q8_K", "layers.1.self_attn.q_proj": "Q8_K", "lm_head": "Q8_1"}
    for path, name in wanted.items():
        model.find(path).type = next(i for i, known in KNOWN_TYPES.items() if known.name == name)
    error = model.refusal()
    assert "Q8_K (2 tensors), Q8_1 (1 tensors)" in str(error)
    assert "Q4_K_M" in str(error)
    assert "Q4_K_M" in error.advice
    assert "download" not in f"{error} {error.advice}"


def test_tables_of_the_published_models():
    assert {name: len(tensor_specs(c)) for name, c in PRESETS.items()} == {
        "Qwen3-30B-A3B": 579,
        "Qwen3-Coder-30B-A3B": 579,
        "Qwen3-235B-A22B": 1131,
        "Qwen3-Coder-480B-A35B": 747,
    }
    shapes = {s.gguf_name: s.shape for s in tensor_specs(CODER)}
    assert shapes["token_embd.weight"] == (151_936, 2048)
    assert shapes["blk.47.attn_q.weight"] == (4096, 2048)
    assert shapes["blk.47.attn_k.weight"] == (512, 2048)
    assert shapes["blk.47.attn_output.weight"] == (2048, 4096)
    assert shapes["blk.47.attn_q_norm.weight"] == (128,)
    assert shapes["blk.47.ffn_gate_inp.weight"] == (128, 2048)
    assert shapes["blk.47.ffn_gate_exps.weight"] == (128, 768, 2048)
    assert shapes["blk.47.ffn_down_exps.weight"] == (128, 2048, 768)


def test_paths_and_names_are_unique():
    specs = tensor_specs(CODER)
    assert len({s.path for s in specs}) == len({s.gguf_name for s in specs}) == len(specs)


def test_tied_model_has_no_lm_head():
    tied = tensor_specs(replace(TINY, tie_word_embeddings=True))
    assert [s.path for s in tensor_specs(TINY) if s not in tied] == ["lm_head"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (48, [*range(6), *range(8, 42, 3), *range(42, 48)]),
        (62, [*range(7), *range(9, 54, 3), *range(54, 62)]),
        (94, [*range(11), *range(13, 82, 3), *range(82, 94)]),
        (6, [2, 5]),
    ],
)
def test_layers_of_more_bits(layers: int, expected: list[int]):
    assert [i for i in range(layers) if uses_more_bits(i, layers)] == expected


def test_q4_k_m_recipe():
    types = q4_k_m_types(CODER)
    assert Counter(types.values()) == {GGMLType.F32: 48 * 5 + 1, GGMLType.Q6_K: 49, GGMLType.Q4_K: 289}
    assert types["lm_head"] is GGMLType.Q6_K
    assert types["layers.5.mlp.experts.down_proj"] is GGMLType.Q6_K
    assert types["layers.6.mlp.experts.down_proj"] is GGMLType.Q4_K
    assert types["layers.8.self_attn.v_proj"] is GGMLType.Q6_K
    assert types["layers.8.self_attn.k_proj"] is GGMLType.Q4_K
    assert types["layers.0.mlp.router"] is GGMLType.F32


def test_q4_k_m_size_of_the_published_model():
    types, specs = q4_k_m_types(CODER), tensor_specs(CODER)
    sizes = {s.path: KNOWN_TYPES[types[s.path]] for s in specs}
    total = 0
    for spec in specs:
        count = 1
        for n in spec.shape:
            count *= n
        total += count // sizes[spec.path].weights * sizes[spec.path].nbytes
    assert total / 2**30 == pytest.approx(17.28, abs=0.01)  # as published for Q4_K_M


def test_rows_that_do_not_fit_superblocks_fall_back():
    types = q4_k_m_types(TINY)  # rows of 32
    assert {types[path] for path in MATRICES if not path.endswith("router")} == {GGMLType.Q8_0}
    narrow = q4_k_m_types(replace(TINY, hidden_size=24))
    assert narrow["embed_tokens"] is GGMLType.F16

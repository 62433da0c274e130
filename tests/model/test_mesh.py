"""A model that is split over devices gives what one device gives, and a split that cannot be is refused."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import packed_nbytes
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types, tensor_specs
from qwen3_moe_jax.core.errors import BackendUnavailableError, MemoryPlanError, OptionError
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import decode_path, placement, sharding
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.jax_backend.sharded_params import device_nbytes, read_parts
from qwen3_moe_jax.jax_backend.sharding import LOGICAL_AXES, MeshShape, Shards, logical_axes
from qwen3_moe_jax.loader import embedded_model, make_runner
from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.parity.contract import load_contract
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from tests.model.run_on_mesh import NEW_TOKENS, PROMPT, SEEN, SHAPES, WRITES
from tests.tolerances import MESH_LOGITS, MESH_STAGE_NMSE

CONFIG = replace(
    SMALL,
    vocab_size=320,
    hidden_size=128,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=64,
)
"""Eight devices have half a KV head each; experts of two blocks of Q8_0 can be split once, 320 ids over two
and over four devices."""

ONE, *SPLIT = SHAPES


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mesh") / "model.gguf"
    write_random_gguf(path, CONFIG, mix="q8_0", seed=5)
    return path


@pytest.fixture(scope="module")
def found(file) -> dict:
    """By shape: facts, and under "arrays" logits and stages."""
    script, arrays = Path(__file__).with_name("run_on_mesh.py"), file.with_suffix(".npz")
    command = [sys.executable, script, file, arrays]
    # its programs run for milliseconds: they are compiled quickly, not well
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    results = json.loads(done.stdout.splitlines()[-1])
    with np.load(arrays) as saved:
        for shape in (*SHAPES, "embedded"):
            its = {n.split(" ", 1)[1]: saved[n] for n in saved if n.startswith(f"{shape} ")}
            results[shape]["arrays"] = its
    return results


@pytest.mark.parametrize("shape", SPLIT)
def test_logits_are_those_of_one_device(found, shape):
    expected, actual = (found[s]["arrays"]["logits"] for s in (ONE, shape))
    np.testing.assert_allclose(actual, expected, atol=MESH_LOGITS * np.abs(expected).max(), rtol=0)
    assert found[shape]["expert_ids"] == found[ONE]["expert_ids"]


def test_stages_are_whole(found):
    expected, actual = (found[shape]["arrays"] for shape in SEEN)
    assert expected.keys() == actual.keys()
    for name, x in expected.items():
        y = actual[name]
        assert x.shape == y.shape, name
        assert np.sum((x - y) ** 2) <= MESH_STAGE_NMSE * np.sum(x**2), name


def test_tokens_are_the_references(found, file):
    with open_model(file) as source:
        runner = make_runner(source, "reference", max_context=64)
        stream = runner.stream(PROMPT, max_tokens=NEW_TOKENS, sampling=Sampling(temperature=0.0))
        assert found[WRITES]["tokens"] == list(stream)


def test_the_embedded_model_holds_the_parity_contract(found):
    bound = load_contract().clauses["PARITY-001"].bound("float32")
    with open_model(embedded_model()) as source:
        forward = make_runner(source, "reference", max_context=64).forward(PROMPT)
    actual = found["embedded"]["arrays"]["logits"]
    dots = (actual * forward.logits).sum(-1)
    lengths = np.linalg.norm(actual, axis=-1) * np.linalg.norm(forward.logits, axis=-1)
    assert (dots / lengths).min() >= bound
    assert (actual.argmax(-1) == forward.logits.argmax(-1)).all()
    assert found["embedded"]["expert_ids"] == forward.expert_ids.tolist()


@pytest.mark.parametrize("shape", SPLIT)
def test_every_device_has_its_share(found, shape):
    size = MeshShape.parse(shape).size
    whole, *rest = found[ONE]["nbytes"]
    assert not rest
    held = found[shape]["nbytes"]
    assert len(held) == size
    assert len(set(held)) == 1
    assert held[0] < whole * (1 / size + 0.3)  # the embedding, the router and norms are whole everywhere
    assert found[shape]["planned"] == sum(held)


def test_what_it_says_of_itself(found):
    facts = found[WRITES]["describe"]
    assert "tp=2,ep=4: 8 devices, each with 1 of 8 heads and 2 of 8 experts, 32 of 64 wide" in facts["mesh"]
    assert "4 collectives per step" in facts["mesh"]  # the head is whole on each of eight devices
    assert "5 collectives per step" in found["tp=2,ep=1"]["describe"]["mesh"]
    assert "per device" in facts["mesh"]
    assert "xla is chosen" in facts["decode"]["one kernel"]
    assert "xla is chosen" in facts["decode"]["few launches per layer"]
    assert found[ONE]["describe"]["mesh"] is None
    assert "split" not in str(found[ONE]["describe"])


def test_programs_made_from_shapes_are_those_that_run(found):
    made = found[WRITES]["made"]
    assert sorted(made) == sorted(set(made))
    assert {"prefill", "decode", "forward_chunk"} <= set(made)


def test_weights_come_back_from_the_devices(found):
    assert found[WRITES]["wrong rows"] == []


def test_a_gpu_holds_its_part_in_tiles(found):
    assert found["tiles"] == []


# The table of axes


def test_every_axis_is_of_a_tensor_that_there_is():
    names = {path.split(".", 2)[-1] for path in q4_k_m_types(CONFIG)}
    assert LOGICAL_AXES.keys() <= names
    assert logical_axes("layers.7.self_attn.q_proj") == ("heads", None)
    assert logical_axes("lm_head") == ("vocab", None)
    assert logical_axes("norm") == ()


@dataclass(frozen=True)
class NoDevice:
    """Stands for one that is not there."""

    number: int
    process_index: int = 0
    platform: str = "gpu"
    compute_capability: str = "9.0"

    @property
    def local_hardware_id(self) -> int:
        return self.number


def shards(shape: str, config=CONFIG, processes: int = 1) -> Shards:
    """A mesh of devices that are not there, those of process 0 first."""
    parsed = MeshShape.parse(shape)
    each = parsed.size // processes
    return Shards.of(parsed, config, [NoDevice(i, i // each) for i in range(parsed.size)])


@pytest.mark.parametrize("shape", ["tp=1,ep=1", "tp=2,ep=1", "tp=1,ep=4", "tp=2,ep=4"])
@pytest.mark.parametrize("name", [*LOGICAL_AXES, "mlp.router"])
def test_parts_cover_a_tensor_once(shape, name):
    path, split = name if name == "lm_head" else f"layers.0.{name}", shards(shape)
    sizes = next(spec.shape for spec in tensor_specs(CONFIG) if spec.path == path)
    count = np.zeros(sizes, np.int8)
    for index in range(split.shape.size):
        count[tuple(slice(*span) for span in split.box(path, sizes, index))] += 1
    copies = split.shape.size // np.prod([split.shape.ways(a) for a in split.axes(path)], dtype=int)
    if name in ("self_attn.k_proj", "self_attn.v_proj"):
        copies = max(1, split.shape.size // CONFIG.num_key_value_heads)
    assert (count == copies).all()


def test_queries_read_the_kv_heads_of_their_device():
    split, width = shards("tp=2,ep=4"), CONFIG.head_dim  # a query head each, a KV head for two devices
    for index in range(8):
        (first, last), _ = split.box("layers.0.self_attn.k_proj", (4 * width, 128), index)
        assert (first // width, last // width) == (index // 2, index // 2 + 1)


# What cannot be


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("tp=3", "8 attention heads are not a multiple of 3"),
        (
            "ep=16",
            "8 attention heads are not a multiple of 16 devices; 8 experts are not a multiple of ep=16",
        ),
        ("tp=4", r"down_proj has 64 columns: 4 parts of 16 cut its Q8_0 blocks of 32"),
    ],
)
def test_a_split_that_cannot_be_is_refused_with_its_numbers(file, shape, words, monkeypatch):
    with open_model(file) as source:
        monkeypatch.setattr(source, "tensor", None)  # nothing is read before
        monkeypatch.setattr(source, "part", None)
        with pytest.raises(OptionError, match=words):
            make_runner(source, "jax", mesh=shape)


def test_too_few_devices(file):
    with open_model(file) as source, pytest.raises(OptionError, match="needs 8 devices, and JAX has"):
        make_runner(source, "jax", mesh="tp=2,ep=4")


@pytest.mark.parametrize(
    ("shape", "owners", "words"),
    [
        ("tp=2", (0, 0, 1, 1, 2), "has 2 devices, which 3 processes cannot share: give a multiple of 3"),
        ("ep=4", (0, 0, 0, 1), "needs 2 devices of each of 2 processes, and process 1 has 1"),
    ],
)
def test_each_process_has_as_many_devices(shape, owners, words):
    devices = [NoDevice(i, owner) for i, owner in enumerate(owners)]
    with pytest.raises(OptionError, match=words):
        Shards.of(MeshShape.parse(shape), CONFIG, devices)
    parts = Shards.of(MeshShape.parse("tp=2"), CONFIG, [NoDevice(i, i // 3) for i in range(6)])
    assert [device.number for device in parts.devices] == [0, 3]


def test_auto_gives_each_process_as_many(file):
    config, types = PRESETS[LARGE[0]], q4_k_m_types(PRESETS[LARGE[0]])
    assert str(MeshShape.fitting(config, types, 6, processes=2)) == "tp=1,ep=4"
    with pytest.raises(OptionError, match="cannot be split over 3 processes: 64 attention heads"):
        MeshShape.fitting(config, types, 6, processes=3)


@pytest.mark.parametrize(("joins", "words"), [(False, "JAX has joined 2 processes"), (True, "mesh says how")])
def test_several_processes_need_a_mesh_and_our_own_joining(file, monkeypatch, joins, words):
    monkeypatch.setattr(placement, "joined", lambda: joins or None)
    with open_model(file) as source, pytest.raises(OptionError, match=words):
        placement.Placement.of(source, None, [NoDevice(0, 0), NoDevice(1, 1)])


@pytest.mark.parametrize("text", ["", "2", "tp=0", "tp=2,tp=2", "dp=2", "tp=2,ep=1,", "auto"])
def test_a_text_that_is_no_mesh(text):
    with pytest.raises(ValueError, match="is not such as"):
        MeshShape.parse(text)


def test_other_backends_have_no_mesh(file):
    with open_model(file) as source, pytest.raises(BackendUnavailableError, match="leave out mesh"):
        make_runner(source, "reference", mesh="tp=2")


# Plans of the large models, from their shapes

LARGE = ("Qwen3-235B-A22B", "Qwen3-Coder-480B-A35B")


@pytest.mark.parametrize(
    ("preset", "devices", "expected"),
    [
        ("Qwen3-30B-A3B", 2, "tp=1,ep=2"),
        ("Qwen3-30B-A3B", 3, "tp=1,ep=2"),
        ("Qwen3-30B-A3B", 8, "tp=1,ep=8"),
        *((preset, n, f"tp=1,ep={n}") for preset in LARGE for n in (2, 4, 8, 16)),
    ],
)
def test_auto_uses_as_many_devices_as_it_can(preset, devices, expected):
    config = PRESETS[preset]
    assert str(MeshShape.fitting(config, q4_k_m_types(config), devices)) == expected


GB_PER_DEVICE = {LARGE[0]: (72.9, 36.7, 18.7, 10.1), LARGE[1]: (148.6, 74.7, 37.7, 20.0)}
"""Of packed Q4_K_M weights on each of 2, 4, 8 and 16 devices."""


@pytest.mark.parametrize("preset", LARGE)
def test_bytes_of_large_models(preset):
    config = PRESETS[preset]
    types, specs = q4_k_m_types(config), tensor_specs(config)
    for n, expected in zip((2, 4, 8, 16), GB_PER_DEVICE[preset], strict=True):
        split = shards(f"ep={n}", config)
        nbytes = device_nbytes(split, types)
        assert nbytes / 1e9 == pytest.approx(expected, abs=0.05)
        everywhere = sum(packed_nbytes(types[s.path], s.shape) for s in specs if not split.is_split(s.path))
        whole = sum(packed_nbytes(types[s.path], s.shape) for s in specs)
        of_kv_heads = [s for s in specs if s.path.endswith(("k_proj", "v_proj"))]
        twice = sum(packed_nbytes(types[s.path], s.shape) for s in of_kv_heads)
        copies = max(1, n // config.num_key_value_heads)
        assert n * nbytes == whole + (n - 1) * everywhere + (copies - 1) * twice
        assert split.collectives in (2 * config.num_hidden_layers, 2 * config.num_hidden_layers + 1)


def test_a_plan_that_does_not_fit_is_refused_with_its_numbers(monkeypatch):
    config = PRESETS[LARGE[0]]
    specs = {spec.path: spec for spec in tensor_specs(config)}
    source = SimpleNamespace(config=config, types=q4_k_m_types(config), specs=specs)
    free = Headroom(70 * 10**9, "of the card")
    monkeypatch.setattr(placement, "available_memory", lambda device: free)
    devices = [NoDevice(i) for i in range(4)]
    place = placement.Placement.of(source, MeshShape(ep=2), devices)
    with pytest.raises(MemoryPlanError, match=r"weights 72.90 GB .* more devices"):
        place.plan(source, 4096, itemsize=2)
    assert placement.Placement.of(source, "auto", devices).plan(source, 4096, itemsize=2).weights < 37e9


@pytest.mark.parametrize(
    ("capability", "wanted", "kernels", "reason"),
    [
        ("9.0", "auto", "hopper", None),
        ("9.0", "portable", "portable", "with Hopper's kernels alone"),
        ("8.9", "auto", "xla", "xla is chosen"),
    ],
)
def test_kernels_of_several_gpus(monkeypatch, capability, wanted, kernels, reason):
    """Hopper's have run on a mesh, and decode there in one kernel where each GPU can write to the others."""
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    devices = [NoDevice(i, compute_capability=capability) for i in range(2)]
    parts = Shards.of(MeshShape(ep=2), CONFIG, devices)
    found = placement.Placement(devices[0], parts).kernels(wanted)
    assert found.name == kernels
    monkeypatch.setattr(sharding, "without_peer_access", lambda ordinals: None)
    model = Qwen3Moe(CONFIG, jnp.bfloat16, kernels=kernels, shards=parts)
    monkeypatch.setattr(decode_path, "_decode_step", lambda: mock.Mock())
    said = decode_path.OneKernel().reason_on(devices[0], model, {})
    assert (said is None) == (reason is None)
    assert reason is None or reason in said
    monkeypatch.setattr(sharding, "without_peer_access", lambda ordinals: tuple(ordinals))
    said = decode_path.OneKernel().reason_on(devices[0], model, {})
    assert "GPU 0 cannot write into the memory of GPU 1" in said


# What is read


def bytes_read(source, monkeypatch) -> list[int]:
    """Collects the bytes of every read of a file from now on; the reads give whatever was in memory."""
    read: list[int] = []
    monkeypatch.setattr(source, "checks", False)
    monkeypatch.setattr(source._file, "read_into", lambda info, start, raw: read.append(len(raw)))
    return read


@pytest.mark.parametrize("path", ["layers.1.mlp.experts.down_proj", "layers.0.self_attn.o_proj", "norm"])
def test_a_part_is_a_part_of_the_whole(file, path):
    with open_model(file) as source:
        whole, shape = source.tensor(path), source.specs[path].shape
        box = tuple((size // 2, size) for size in shape) if len(shape) > 1 else ((0, shape[0]),)
        part = source.part(path, box)
        for name, array in whole.part(box).arrays.items():
            np.testing.assert_array_equal(part.arrays[name], array)


def test_blocks_are_not_cut(file):
    with open_model(file) as source:
        w = source.tensor("layers.0.mlp.experts.down_proj")
        with pytest.raises(ValueError, match="blocks of 32 weights are not cut"):
            w.part(((0, 8), (0, 128), (0, 16)))


def test_one_process_reads_a_file_once(file, monkeypatch):
    split = shards("tp=2,ep=4")
    with open_model(file) as source:
        read = bytes_read(source, monkeypatch)
        for path in source.paths():
            assert read_parts(source, split, path)
        assert sum(read) == source.nbytes


def test_each_process_reads_its_own_rows_alone(file, monkeypatch):
    split = shards("tp=2,ep=4", processes=2)
    by_column = ("self_attn.o_proj",)  # of which whole rows are read
    with open_model(file) as source:
        read = bytes_read(source, monkeypatch)
        for path in source.paths():
            read.clear()
            read_parts(source, split, path)
            is_halved = split.is_split(path) and not path.endswith(by_column)
            assert sum(read) == source.tensor_nbytes(path) // (1 + is_halved), path


def test_a_damaged_block_is_named_by_its_place_in_the_file(file):
    with open_model(file) as source:
        read_into = source._file.read_into

        def damaged(info, start, raw):
            read_into(info, start, raw)
            raw[:2] = (0, 0x7C)  # the first scale that is read: infinity

        source._file.read_into = damaged
        with pytest.raises(ModelFileError, match="expert 6, row 0"):
            source.part("layers.0.mlp.experts.up_proj", ((6, 8), (0, 64), (0, 128)))

"""The choice of the way in which tokens are written, asked of the kernels once and then of the disk."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.jax_backend import programs, remembered_choice
from qwen3_moe_jax.jax_backend.decode_path import PATHS, Decoder, LayerByLayer
from qwen3_moe_jax.jax_backend.program_store import ProgramStore
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.jax_backend.session_programs import Session
from qwen3_moe_jax.kernels_pallas.gpu import device as gpu

CONFIG = PRESETS["Qwen3-30B-A3B"]
TYPES = q4_k_m_types(CONFIG)
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132, device_kind="H100")
MODEL = Qwen3Moe(CONFIG, jnp.dtype(jnp.bfloat16))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """How often the kernels were asked, with an empty store."""
    calls = []

    def choose(model, params, device, cache_dtype):
        calls.append(device)
        return Decoder(model, PATHS[1:], ((PATHS[0].name, "multiprocessors 3"),))

    monkeypatch.setattr(remembered_choice, "choose", choose)
    monkeypatch.setattr(gpu, "tell_runtime", lambda: True)
    before, was_chosen = programs._store, programs._is_chosen
    programs.use_store(ProgramStore(tmp_path / "programs"))
    yield calls
    programs._store, programs._is_chosen = before, was_chosen


def chosen(model=MODEL, types=TYPES, device=H100, cache_dtype=jnp.float16):
    return remembered_choice.remembered_choice(model, types, {}, device, cache_dtype)


def test_a_second_start_is_told_the_same_and_asks_no_kernel(asked):
    first, second = chosen(), chosen()
    assert first == second
    assert (second.paths, second.refused) == (PATHS[1:], ((PATHS[0].name, "multiprocessors 3"),))
    assert len(asked) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"model": Qwen3Moe(CONFIG, jnp.dtype(jnp.float32))},
        {"model": Qwen3Moe(CONFIG, jnp.dtype(jnp.bfloat16), kernels="portable")},
        {"types": TYPES | {"layers.3.self_attn.o_proj": GGMLType.IQ3_S}},
        {"device": SimpleNamespace(**vars(H100), shared_memory_per_block_optin=60_000)},
        {"cache_dtype": jnp.int8},
    ],
)
def test_what_it_depends_on_is_in_the_key(asked, other):
    chosen()
    chosen(**other)
    chosen(**other)
    assert len(asked) == 2


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"paths": ["a way of later"], "refused": []}'])
def test_what_no_choice_is_is_asked_anew(asked, content):
    chosen()
    (file,) = programs.store().folder.glob("*.program")
    programs.store().put(file.stem, content)
    assert chosen().paths == PATHS[1:]
    assert len(asked) == 2
    chosen()
    assert len(asked) == 2, "and kept again"


def test_a_cpu_and_a_process_without_a_store_ask(asked):
    chosen(device=SimpleNamespace(platform="cpu"))
    programs.use_store(None)
    chosen()
    assert len(asked) == 2


def test_a_session_that_finds_its_choice_imports_no_kernel(asked, monkeypatch):
    """Their import takes half a second beside the load of the weights."""
    monkeypatch.setattr(remembered_choice, "choose", lambda model, *_: Decoder(model, PATHS))
    session = lambda slots: Session.of(MODEL, TYPES, H100, 1024, jnp.float16, slots=slots)
    session(1)

    def refused(module):
        raise AssertionError(f"{module} is imported")

    monkeypatch.setattr(gpu, "import_kernels", refused)
    for slots in (1, 64):
        found = session(slots)
        assert found.decoder.paths == PATHS
        labels = [wanted.label for wanted in found.programs()]
        assert ("a token of 64 sequences" in labels) == (slots == 64)


def test_rows_of_one_launch_are_those_of_the_way_that_is_taken():
    decoder = Decoder(MODEL, PATHS)
    assert [rows for rows in (1, 2, 16, 17, 64, 65) if decoder.is_one_launch(rows)] == [1, 2, 16]
    assert not Decoder(MODEL, (LayerByLayer(),)).is_one_launch(1)


def test_without_the_runtime_of_kernels_they_are_imported(asked, monkeypatch):
    """A program with kernels could not be loaded: XLA would not find what launches them."""
    chosen()
    monkeypatch.setattr(gpu, "tell_runtime", lambda: False)
    chosen()
    assert len(asked) == 2

"""The choice of the way in which tokens are written, and what the runner says of it."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from qwen3_moe_jax.commands import doctor
from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.jax_backend import consecutive
from qwen3_moe_jax.jax_backend.decode_path import (
    PATHS,
    Decoder,
    FewLaunches,
    LayerByLayer,
    OneKernel,
    choose,
    plan_decoding,
)
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, abstract_params, tiled_params
from qwen3_moe_jax.jax_backend.qwen3_moe import Intervention, Qwen3Moe
from qwen3_moe_jax.kernels_pallas import CACHE_TILE, implementations
from qwen3_moe_jax.kernels_pallas.gpu import device as gpu
from qwen3_moe_jax.loader import embedded_model

CONFIG = PRESETS["Qwen3-30B-A3B"]
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132, device_kind="H100")
NAMES = [path.name for path in PATHS]


def test_on_a_cpu_the_network_runs_as_it_is_defined(exact_runner):
    decoder = exact_runner.decoder
    assert decoder.paths == (LayerByLayer(),)
    assert [name for name, _ in decoder.refused] == NAMES[:2]
    assert all("xla is chosen" in reason for _, reason in decoder.refused)
    facts = exact_runner.describe()
    assert list(facts["decode"]) == NAMES
    assert facts["decode"]["layer by layer"] == "everything else"
    assert facts["fallbacks"] == [], "a CPU lacks nothing"


def test_the_runner_says_what_ran(exact_runner):
    facts = exact_runner.describe()
    assert facts["implementations"] == {"F32": "xla", "Q4_K": "xla", "Q6_K": "xla"}
    assert (facts["kernels"], facts["refused"]) == ("xla", [])
    assert facts["kernels_reason"].endswith("a dtype is asked for")


def test_what_has_run_of_some_types_does_not_hide_the_others(exact_runner, monkeypatch):
    some = implementations.Record()
    some.add(next(ran for ran in exact_runner._recorded() if GGMLType.Q6_K in ran.types))
    monkeypatch.setattr(exact_runner, "_record", some)
    assert set(exact_runner.describe()["implementations"]) == {"F32", "Q4_K", "Q6_K"}


@pytest.fixture(scope="module")
def params():
    return tiled_params(abstract_params(CONFIG, q4_k_m_types(CONFIG), GPU_ROLES))


@pytest.fixture
def on_hopper(monkeypatch):
    """Kernels are imported and asked, as on an H100."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="GPU kernels need JAX 0.11")
    if jax.__version_info__ < (0, 11):
        pytest.skip("GPU kernels need JAX 0.11")
    from qwen3_moe_jax.kernels_pallas.decode_layers import api

    for module in (gpu, api):
        for name in ("require_hopper", "require_ampere"):
            monkeypatch.setattr(module, name, lambda *args: None)


def cache_of(batch, dtype=jnp.float16):
    return jax.eval_shape(lambda: KVCache.create(CONFIG, batch, 64, dtype))


MODEL = Qwen3Moe(CONFIG, jnp.bfloat16)


def test_an_h100_has_all_ways(params, on_hopper):
    decoder = choose(MODEL, params, H100, jnp.float16)
    assert (decoder.paths, decoder.refused) == (PATHS, ())
    assert decoder.is_batch_invariant
    taken = {batch: decoder.path(params, batch, cache_of(batch)).name for batch in (1, 16, 17, 64, 65)}
    assert taken == dict(zip(taken, [NAMES[i] for i in (0, 0, 1, 1, 2)], strict=True))
    assert decoder.describe() == {
        "one kernel": "1 to 16 sequences",
        "few launches per layer": "17 to 64 sequences",
        "layer by layer": "everything else",
    }


@pytest.mark.parametrize(
    ("batch", "dtype", "op"),
    [
        (1, jnp.float16, "decode_step"),
        (17, jnp.float16, "decode_layers"),
        (65, jnp.float16, "moe_mlp"),
        (2, jnp.int8, "decode_step"),
        (17, jnp.int8, "moe_mlp"),
    ],
)
def test_what_runs_is_what_was_told(params, on_hopper, batch, dtype, op):
    """The operation of each way notes itself where it runs; ``describe`` is what people were told."""
    decoder = choose(MODEL, params, H100, dtype)
    shape, cache = partial(jax.ShapeDtypeStruct, dtype=jnp.int32), cache_of(batch, dtype)
    with implementations.recording() as record:
        step = jax.eval_shape(decoder.step, params, shape((batch, 1)), shape((batch,)), cache)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), step.cache) == jax.tree.map(
        lambda a: (a.shape, a.dtype), cache
    )
    ran = {ran.op for ran in record} & {"decode_step", "decode_layers", "moe_mlp"}
    left = [name for name in decoder.describe() if name not in dict(decoder.refused)]
    told = [name for name in left if _is_for(batch, decoder.describe()[name])]
    assert (ran, told[0]) == ({op}, NAMES[("decode_step", "decode_layers", "moe_mlp").index(op)])


def _is_for(batch: int, sequences: str) -> bool:
    """``sequences``: of :meth:`Decoder.describe`, "17 to 64 sequences" or "everything else"."""
    numbers = [int(word) for word in sequences.split() if word.isdigit()]
    return not numbers or numbers[0] <= batch <= numbers[1]


@pytest.mark.parametrize(
    ("device", "dtype", "compute", "reasons"),
    [
        ({"compute_capability": "7.5"}, jnp.float16, jnp.bfloat16, ["compute capability 7.5"]),
        ({"core_count": 3}, jnp.float16, jnp.bfloat16, ["multiprocessors 3"]),
        ({"shared_memory_per_block_optin": 60_000}, jnp.float16, jnp.bfloat16, ["shared memory"]),
        ({}, jnp.int8, jnp.bfloat16, ["KV cache of 16 bits, and it is int8"]),
        ({}, jnp.float32, jnp.bfloat16, ["16 bits or int8, and it is float32", "16-bit caches, not float32"]),
        ({}, jnp.float16, jnp.float32, ["compute_dtype is float32"] * 2),
    ],
)
def test_what_keeps_a_gpu_from_a_way_is_named(params, on_hopper, device, dtype, compute, reasons):
    decoder = choose(Qwen3Moe(CONFIG, compute), params, SimpleNamespace(**vars(H100) | device), dtype)
    assert len(decoder.refused) == len(reasons)
    for (_, said), reason in zip(decoder.refused, reasons, strict=True):
        assert reason in said


@pytest.mark.parametrize(("dtype", "reason"), [(jnp.float16, None), (jnp.int8, "over several GPUs")])
def test_a_cache_that_has_not_run_on_a_mesh_is_refused_there(params, on_hopper, dtype, reason):
    from tests.model.test_mesh import shards

    model = MODEL.clone(kernels="hopper", shards=shards("tp=1,ep=2"))
    found = OneKernel().reason_against(model, params, 1, cache_of(1, dtype))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("type", "reason"), [(GGMLType.IQ3_S, "type of o IQ3_S"), (GGMLType.F16, None)])
def test_a_type_that_a_kernel_lacks_leaves_the_rest_to_kernels(on_hopper, type, reason):
    """Then each operation runs by itself, and this type's alone by XLA."""
    types = q4_k_m_types(CONFIG) | {"layers.3.self_attn.o_proj": type}
    decoder = choose(MODEL, tiled_params(abstract_params(CONFIG, types, GPU_ROLES)), H100, jnp.float16)
    refused = dict(decoder.refused)
    assert "not 'rows'" in refused.pop("few launches per layer")
    if reason is None:
        assert not refused
    else:
        assert reason in refused["one kernel"]
        assert "XLA multiplies by this type alone" in refused["one kernel"]


def test_the_embedded_model_decodes_as_one_kernel(on_hopper):
    with open_model(embedded_model()) as source:
        decoder = plan_decoding(source.config, source.types, H100)
    assert decoder.paths[0] == OneKernel()


@pytest.mark.parametrize(
    ("settings", "is_forced", "expected"),
    [
        ({}, True, {1: "one kernel", 32: "layer by layer"}),
        ({"capture": frozenset({"l_out"})}, False, {1: "layer by layer", 32: "layer by layer"}),
        ({"capture": frozenset({"result_norm"})}, False, {1: "layer by layer", 32: "few launches per layer"}),
        ({"layers": (0, 1)}, False, {1: "layer by layer", 32: "layer by layer"}),
        (
            {"interventions": (Intervention("ffn_moe_logits", jnp.negative),)},
            False,
            {1: "layer by layer", 32: "few launches per layer"},
        ),
    ],
)
def test_what_is_to_be_seen_chooses_the_way(params, on_hopper, settings, is_forced, expected):
    decoder = Decoder(MODEL, PATHS).clone(**settings)
    assert {b: decoder.path(params, b, cache_of(b), is_forced).name for b in expected} == expected


def test_the_kernels_limits_are_the_ways():
    api = pytest.importorskip("qwen3_moe_jax.kernels_pallas.decode_step.api", reason="needs JAX 0.11")
    from qwen3_moe_jax.kernels_pallas.decode_layers import kernel_sm90
    from qwen3_moe_jax.kernels_pallas.decode_step.primitives.layouts import CHUNK

    assert OneKernel.batches == range(1, api.MAX_BATCH + 1)
    assert CACHE_TILE % CHUNK == 0
    assert FewLaunches.batches == range(kernel_sm90._MIN_ROWS, kernel_sm90.MAX_FEW_ROWS + 1)


def test_decoding_is_planned_without_weights(on_hopper):
    planned = plan_decoding(CONFIG, q4_k_m_types(CONFIG), H100)
    assert [path.name for path in planned.paths] == NAMES
    assert planned.is_batch_invariant


def test_the_doctor_says_how_a_token_is_decoded_on_a_gpu(monkeypatch):
    assert doctor.judge_decoding(None) == [], "no GPU, nothing to say"
    monkeypatch.setattr(doctor.loader, "jax_sees_gpu", lambda: True)
    (found,) = doctor.judge_decoding(None)
    assert (found.level, found.subject) == ("note", "decoding")
    assert found.text.startswith("one kernel: ")
    assert found.text.endswith("layer by layer: everything else")


@pytest.mark.parametrize(
    ("kernels", "dtype", "reason"),
    [
        ("hopper", jnp.float16, None),
        ("portable", jnp.float16, "portable decode kernel it has not run on a GPU"),
        ("hopper", jnp.int8, "int8 cache it has not run on a GPU"),
    ],
)
def test_tokens_at_once_are_for_kernels_that_have_run_them(kernels, dtype, reason):
    """Prompt lookup on a GPU that is not there: what is not known to keep the bits is refused."""
    types = q4_k_m_types(CONFIG)
    decoder = plan_decoding(CONFIG, types, H100, kernels)
    params = tiled_params(abstract_params(CONFIG, types, GPU_ROLES))
    cache = jax.eval_shape(lambda: KVCache.create(CONFIG, 1, CACHE_TILE, dtype))
    found = consecutive.reason_against(decoder, params, 8, cache)
    assert found is None if reason is None else reason in found

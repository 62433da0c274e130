"""One token of each of many sequences through all layers: the kernels in Pallas' interpreters."""

import contextlib
import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import to_gpu_tiles
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.jax_backend import decode_path, sharding
from qwen3_moe_jax.jax_backend.decode_path import few_launches
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, abstract_params, is_tiled, plan_layers, tiled_params
from qwen3_moe_jax.jax_backend.qwen3_moe import Intervention, Qwen3Moe
from qwen3_moe_jax.kernels_pallas.decode_layers import api, kernel_sm90
from qwen3_moe_jax.kernels_pallas.decode_layers import row_steps as steps
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import ONE_DEVICE, Split
from qwen3_moe_jax.kernels_pallas.gpu import grouped_matmul_config as matmul_config
from qwen3_moe_jax.kernels_pallas.gpu import grouped_matmul_sm90 as matmul_sm90
from qwen3_moe_jax.kernels_pallas.gpu.activations import SWIGLU_SCALE, WEIGHT_SCALE, float16_operand
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable
from qwen3_moe_jax.kernels_pallas.router.xla import choose_experts
from tests import tolerances
from tests.kernels.op_inputs import needs_hopper_gpu, random_weights, rng
from tests.kernels.op_oracles import check
from tests.kernels.races import no_races

__all__ = ["no_races", "rng"]


CONFIG = replace(
    PRESETS["Qwen3-30B-A3B"],
    num_hidden_layers=2,
    hidden_size=512,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
    vocab_size=64,
)
LENGTH = 256


def types_of(kinds: tuple[GGMLType, ...]) -> dict[str, GGMLType]:
    """``kinds``: of each layer's v_proj and down_proj; Q4_K elsewhere."""
    types = {}
    for spec in tensor_specs(CONFIG):
        types[spec.path] = GGMLType.Q4_K
        if len(spec.shape) == 1 or spec.path.endswith("router"):
            types[spec.path] = GGMLType.F32
        elif spec.path.endswith(("v_proj", "down_proj")):
            types[spec.path] = kinds[int(spec.path.split(".")[1])]
    return types


def random_params(rng, types: dict[str, GGMLType]) -> dict:
    plan = plan_layers(CONFIG, types, GPU_ROLES)
    tiled = tiled_params(abstract_params(CONFIG, types, GPU_ROLES))["layers"].stacks
    stacks = {}
    for name, like in plan.stacks.items():
        if not isinstance(like, PackedTensor):
            stacks[name] = rng.uniform(0.5, 1.5, like.shape).astype(np.float32)
        elif like.type is GGMLType.F32:
            w = rng.normal(0, 0.05, like.shape).astype(np.float32)
            stacks[name] = PackedTensor({"w": w}, like.type)
        else:
            w = random_weights(rng, like.type, like.shape)
            stacks[name] = to_gpu_tiles(w) if is_tiled(tiled[name]) else w
    embedding = rng.normal(size=(CONFIG.vocab_size, CONFIG.hidden_size)).astype(np.float32)
    params = {
        "layers": LayerTable(stacks, plan.tensors),
        "embed_tokens": PackedTensor({"w": embedding}, GGMLType.F32),
    }
    return jax.tree.map(jnp.asarray, params)


def random_cache(rng, sequences: int) -> KVCache:
    cache = KVCache.create(CONFIG, sequences, LENGTH, jnp.float16)
    random = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype)
    return replace(cache, k=random(cache.k), v=random(cache.v))


def skew(logits: jax.Array) -> jax.Array:
    return logits + jnp.asarray(-2 * np.log(np.arange(1, 17)), jnp.float32)


def compare(
    kinds: list[str],
    sequences: int,
    *,
    kernels: str = "hopper",
    is_skewed: bool = False,
    is_interpreted: bool = False,
) -> None:
    """The kernels against float32 operations of XLA with the kernels' experts, slots in any order.

    Each expert must be the choice by the float32 logits too, up to ``ROUTER_TIE`` of their size.
    """
    rng = np.random.default_rng(5)
    types = types_of(tuple(GGMLType[kind] for kind in kinds))
    interventions = (Intervention("ffn_moe_logits", skew),) if is_skewed else ()
    model = Qwen3Moe(CONFIG, jnp.float32, interventions=interventions)
    forced = model.clone(compute_dtype=jnp.bfloat16, kernels=kernels)
    params, cache = random_params(rng, types), random_cache(rng, sequences + 1)
    tokens = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (sequences, 1)), jnp.int32)
    starts = np.resize([0, LENGTH - 1, 127, 128, 60], sequences)
    slots = jnp.asarray(rng.permutation(sequences + 1)[:sequences], jnp.int32)
    span = Span(jnp.asarray(starts, jnp.int32), 1, slots)
    with contextlib.ExitStack() as patches:
        if is_interpreted:
            run = partial(kernel_sm90.decode_layers, interpret=interpreter(detect_races=True))
            for where, name, value in (
                (api, "require_hopper", lambda: None),
                (api, "require_ampere", lambda: None),
                (kernel_sm90, "decode_layers", run),
                (kernel_sm90, "_MIN_ROWS", 1),
                (matmul_sm90, "multiprocessors", lambda: 3),
                (matmul_config, "multiprocessors", lambda: 3),
            ):
                patches.enter_context(mock.patch.object(where, name, value))
        ran = patches.enter_context(
            mock.patch.object(kernel_sm90, "decode_layers", wraps=kernel_sm90.decode_layers)
        )
        actual = few_launches(forced.bind(params), tokens, cache, span)
        assert ran.call_args.kwargs["kernels"] is kernel_sm90.BY_NAME[kernels]
    ids = actual.expert_ids
    recorder = model.clone(capture=frozenset({"ffn_moe_logits"}))
    with jax.default_matmul_precision("highest"):
        expected, shown = recorder.bind(params).watched(lambda n: n(tokens, cache, [span], ids))
    logits = np.asarray(shown["ffn_moe_logits"])
    best = -np.sort(-logits, axis=-1)[..., : ids.shape[-1]]
    behind = best - np.take_along_axis(logits, np.asarray(ids), axis=-1)
    assert np.abs(behind).max() <= tolerances.ROUTER_TIE * logits.std()
    assert (np.diff(np.sort(ids, axis=-1)) > 0).all()
    bound = tolerances.DECODE_LAYERS_NMSE
    check(actual.hidden, np.asarray(expected.hidden), bound, "hidden")
    for name in ("k", "v"):
        check(getattr(actual.cache, name), np.asarray(getattr(expected.cache, name), np.float64), bound, name)


SETS = pytest.mark.parametrize("kernels", kernel_sm90.BY_NAME)


@needs_hopper_gpu
@SETS
@pytest.mark.parametrize("sequences", [17, 32, 64])
@pytest.mark.parametrize("kinds", [["Q4_K", "Q6_K"], ["Q6_K", "Q6_K"], ["Q4_K", "Q4_K"]], ids="-".join)
def test_layers_equal_the_model_on_a_gpu(kinds, sequences, kernels):
    compare(kinds, sequences, kernels=kernels)


@SETS
def test_layers_equal_the_model(kernels):
    """Layers of two types."""
    compare(["Q4_K", "Q6_K"], 4, kernels=kernels, is_skewed=True, is_interpreted=True)


def test_which_kernels_layers_are_made_of(monkeypatch):
    """Those that are named, else Hopper's where they run."""

    def refuse():
        raise NotImplementedError("another card")

    monkeypatch.setattr(api, "require_ampere", lambda: None)
    monkeypatch.setattr(api, "require_hopper", lambda: None)
    assert [api._chosen(name) for name in (None, "hopper", "portable")] == ["hopper", "hopper", "portable"]
    monkeypatch.setattr(api, "require_hopper", refuse)
    assert [api._chosen(name) for name in (None, "portable")] == ["portable"] * 2
    with pytest.raises(NotImplementedError, match="another card"):
        api._chosen("hopper")


def test_choice_is_the_routers(rng):
    """Ties go to the lower id; every pair lies in a tile of its expert, in order; none chose expert 5."""
    logits = np.round(rng.normal(size=(20, 16)), 1).astype(np.float32)
    logits[:, 5] = -50
    routes = steps.choose(jnp.asarray(logits), 3, 8, steps.Share(ONE_DEVICE, 16))
    by_hand = np.argsort(-logits, axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(routes.expert_ids, by_hand)
    weights = choose_experts(jnp.asarray(logits), 3, None)[2]
    tiles, pairs = routes.tiles, np.asarray(routes.pairs)
    seen: dict[int, list[int]] = {}
    for number in range(int(tiles.count[0])):
        at = int(tiles.start[number]) + np.arange(int(tiles.rows[number]))
        assert len(at) <= 8
        seen.setdefault(int(tiles.expert[number]), []).extend(p for p in pairs[at] if p >= 0)
    expected = {e: np.flatnonzero(by_hand.reshape(-1) == e).tolist() for e in np.unique(by_hand)}
    assert seen == expected
    assert 5 not in seen
    held = np.flatnonzero(pairs >= 0)
    assert sorted(pairs[held]) == list(range(60))
    np.testing.assert_array_equal(np.asarray(routes.rows)[held], pairs[held] // 3)
    factors = np.asarray(weights).reshape(-1)[pairs[held]] / (SWIGLU_SCALE * WEIGHT_SCALE)
    np.testing.assert_allclose(np.asarray(routes.factors)[held], factors, rtol=1e-6)


def test_each_device_sorts_the_pairs_of_its_own_experts(rng):
    """All devices choose alike; the pairs of others have no row, and what nobody wrote counts as zero."""
    logits = jnp.asarray(rng.normal(size=(20, 16)), jnp.float32)
    ids = np.asarray(choose_experts(logits, 3, None)[1]).reshape(-1)
    share, seen = steps.Share(Split(ep=4), 4), []
    for device in range(4):
        with mock.patch.object(steps.lax, "axis_index", return_value=device):
            routes = steps.choose(logits, 3, 8, share)
            pairs = np.asarray(routes.pairs)
            pairs = pairs[pairs >= 0]
            written = jnp.full((60, 2), jnp.nan).at[pairs].set(1.0).reshape(20, 3, 2)
            own = share.own(written, routes.expert_ids)
        np.testing.assert_array_equal(np.asarray(routes.expert_ids).reshape(-1), ids)
        assert (ids[pairs] // 4 == device).all()
        assert int(routes.tiles.rows.sum()) == sum(-(-n // 8) * 8 for n in np.bincount(ids[pairs]))
        np.testing.assert_array_equal(own.reshape(60, 2)[:, 0], ids // 4 == device)
        seen += pairs.tolist()
    assert sorted(seen) == list(range(60))


LOWER = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from unittest import mock
from jax.sharding import PartitionSpec as P
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from qwen3_moe_jax.kernels_pallas.decode_layers.sum_sm90 import sum_of_devices
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import DEVICE_AXES, Split
mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 2), DEVICE_AXES)
run = partial(sum_of_devices, mesh=Split(2, 2))
split = jax.shard_map(run, mesh=mesh, in_specs=P(DEVICE_AXES), out_specs=P(), check_vma=False)
with mock.patch("jax.experimental.mosaic.gpu.utils._infer_arch", return_value=(9, 0)):
    traced = jax.jit(split).trace(jax.ShapeDtypeStruct((256, 2048), jnp.float32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
print(text.count("custom_call @mosaic_gpu"), "all_reduce" in text, "setp.eq.u32 late" in text)
"""


def test_a_sum_by_stores_lowers_without_a_collective():
    """Of four devices, and it does not wait for ever. The log has its run on two H200."""
    command = [sys.executable, "-c", LOWER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["1", "False", "True"], done.stderr[-2000:]


def test_who_adds_by_stores():
    """Not where the devices are of several processes, nor by other kernels."""
    from tests.model.test_mesh import shards

    model = Qwen3Moe(CONFIG, jnp.bfloat16, kernels="hopper")
    assert not decode_path._adds_by_stores(model)
    with mock.patch.object(sharding, "without_peer_access", return_value=None):
        split = model.clone(shards=shards("tp=1,ep=2"))
        assert decode_path._adds_by_stores(split)
        assert not decode_path._adds_by_stores(split.clone(kernels="portable"))
        assert not decode_path._adds_by_stores(model.clone(shards=shards("tp=1,ep=2", processes=2)))
    with mock.patch.object(sharding, "without_peer_access", return_value=(0, 1)):
        assert not decode_path._adds_by_stores(split)


def test_choice_of_a_row_that_is_not_finite(rng):
    """Its weights are NaN, whatever it chose; the others' are not."""
    logits = np.array(rng.normal(size=(32, 16)), np.float32)
    logits[3, 7] = np.inf
    routes = steps.choose(jnp.asarray(logits), 3, 8, steps.Share(ONE_DEVICE, 16))
    factors, pairs = np.asarray(routes.factors), np.asarray(routes.pairs)
    assert np.asarray(routes.expert_ids).max() < 16
    of_row = (pairs >= 0) & (np.asarray(routes.rows) == 3)
    assert of_row.sum() == 3
    assert np.isnan(factors[of_row]).all()
    assert np.isfinite(factors[~of_row]).all()


def test_norm_and_operand(rng):
    """The parts are added, the operand is that of the norm's result, rows after the last are zeros."""
    x = rng.normal(size=(5, 768)).astype(np.float32)
    x *= np.array([1e-3, 1, 1e3, 0, 30], np.float32)[:, None]
    parts = rng.normal(size=(3, 32, 768)).astype(np.float32)
    parts[:, 3] = 0
    weight = rng.uniform(0.5, 1.5, 768).astype(np.float32)
    total = jnp.asarray(x) + steps.sum_parts(jnp.asarray(parts), len(x))
    exact = x + parts.astype(np.float64)[:, :5].sum(axis=0)
    np.testing.assert_allclose(total, exact, rtol=1e-5, atol=1e-6)
    out = steps.norm(total, jnp.asarray(weight), 1e-6, 32)
    normed = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(out.normed, normed, rtol=1e-5, atol=1e-6)
    operand, scale = float16_operand(out.normed, 32)
    np.testing.assert_array_equal(out.operand, operand)
    np.testing.assert_array_equal(out.scale, scale)
    assert not np.asarray(out.operand)[5:].any()


def test_results_that_are_not_meant_may_be_anything():
    nothing = jnp.full(3, jnp.nan)
    np.testing.assert_array_equal(steps.pick([nothing, jnp.ones(3), nothing], jnp.int32(1)), np.ones(3))


def table_of(**types: str) -> LayerTable:
    """A table of q_proj, k_proj and v_proj of two layers: "Q4_K Q6_K" names a tensor's types."""
    shapes = {f"self_attn.{name}": (64, 256) for name in types}
    kinds = {f"self_attn.{name}": its.split() for name, its in types.items()}
    layers = [{name: GGMLType[its[layer]] for name, its in kinds.items()} for layer in range(2)]
    return LayerTable.plan(shapes, layers, GPU_ROLES)


def as_one(table, *, may_read_beyond=True):
    return kernel_sm90._qkv_as_one(table, may_read_beyond=may_read_beyond)


def test_which_queries_keys_and_values_are_one_product():
    table = table_of(q_proj="Q4_K Q4_K", k_proj="Q4_K Q4_K", v_proj="Q4_K Q4_K")
    assert as_one(table)[0].shape == (192, 256)
    table = table_of(q_proj="Q4_K Q4_K", k_proj="Q4_K Q4_K", v_proj="Q6_K Q6_K")
    whole, others, which = as_one(table)
    assert (whole.shape, others, which) == ((128, 256), (0,), (1, 1))
    table = table_of(q_proj="Q4_K Q4_K", k_proj="Q4_K Q4_K", v_proj="Q4_K Q6_K")
    whole, others, which = as_one(table)
    assert (whole.shape, others, which) == ((192, 256), (1,), (0, 1))
    whole, others, which = as_one(table, may_read_beyond=False)
    assert (whole.shape, others, which) == ((128, 256), (0, 1), (1, 2))
    other_order = table_of(q_proj="Q4_K Q4_K", v_proj="Q4_K Q4_K", k_proj="Q4_K Q4_K")
    with pytest.raises(NotImplementedError, match="one after the other"):
        as_one(other_order)
    for mixed in ("Q6_K Q6_K", "Q4_K Q6_K"):
        with pytest.raises(NotImplementedError, match="one type"):
            as_one(table_of(q_proj="Q4_K Q4_K", k_proj=mixed, v_proj="Q4_K Q4_K"))
    alone = {f"self_attn.{name}_proj": (64, 256) for name in "qkv"}
    apart = LayerTable.plan(alone, [dict.fromkeys(alone, GGMLType.Q4_K)], {})
    with pytest.raises(NotImplementedError, match="in one stack"):
        as_one(apart)

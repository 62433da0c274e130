"""The decode kernel's body in Pallas' interpreter, with one block, against plain float32 NumPy.

One block needs no grid barrier (the interpreter has none); integer products and a few other instructions
have emulated twins. Everything else is the code that runs on the GPU.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILED_TYPES, to_gpu_tiles
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize, pack
from qwen3_moe_jax.jax_backend.device_load import as_rows
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, plan_layers, split_path
from qwen3_moe_jax.kernels_pallas import LayerTable
from qwen3_moe_jax.kernels_pallas.decode_step import api
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid
from qwen3_moe_jax.kernels_pallas.gpu.interpreter import interpreter
from qwen3_moe_jax.testing.random_models import random_blocks
from tests.tolerances import DECODE_STEP_IN_COMPANY

SEED = 20260924
ODD_SEED = 20260926
"""The fourth and fifth expert are not near to each other."""
CONFIG = replace(
    PRESETS["Qwen3-30B-A3B"],
    vocab_size=64,
    hidden_size=2048,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=4,
    moe_intermediate_size=256,
)
T = GGMLType
Q4, Q5, Q6, Q8 = T.Q4_K, T.Q5_K, T.Q6_K, T.Q8_0
TYPES = {
    "embed": Q4,
    "q": Q4,
    "k": Q4,
    "v": Q6,
    "o": Q8,
    "router": T.F32,
    "gate": Q5,
    "down": Q6,
    "lm_head": Q6,
}
ODD = replace(CONFIG, hidden_size=768, num_attention_heads=8, head_dim=64)
"""Columns that are no whole span of the kernel, and heads of the embedded model's size and number."""
ODD_TYPES = TYPES | {"embed": Q6, "q": T.F16, "k": T.Q4_0, "v": T.Q4_0, "o": T.BF16, "router": T.BF16}
ODD_TYPES |= {"gate": T.IQ4_XS, "down": T.Q2_K, "lm_head": None}


SCALE = {Q4: 1.4e-4, Q5: 0.7e-4, Q6: 1.5e-5, Q8: 2.7e-4}
"""Scales of superblocks, for weights of about 0.02."""


def random_tensor(rng, type: GGMLType, shape: tuple[int, ...]) -> PackedTensor:
    is_norm, block = len(shape) == 1, BLOCK_FORMATS[type]
    count = int(np.prod(shape)) // block.weights
    if type is T.F32:
        values = rng.normal(1 if is_norm else 0, 0.1 if is_norm else 0.03, shape)
        return PackedTensor({"w": values.astype(np.float32)}, type)
    if type not in SCALE:
        return pack(random_blocks(type, count, rng, 0.03).reshape(-1), type, shape)
    blocks = rng.integers(0, 256, (count, block.nbytes), dtype=np.uint8)
    for name, factor in (("d", 1.0), ("dmin", 7.5 if type is Q4 else 15.5)):
        if name in block.fields:
            at = block.fields[name].offset
            scale = SCALE[type] * factor * rng.uniform(0.75, 1.25, count)
            blocks[:, at : at + 2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    return pack(blocks.reshape(-1), type, shape)


def gpu_params(config, packed, types):
    """The parameter tree as a GPU holds it (``params.load_params``), made in NumPy."""
    plan = plan_layers(config, types, GPU_ROLES)
    places = {tensor.name: tensor for tensor in plan.tensors}
    parts, params = {}, {}
    for path, tensor in packed.items():
        value = dequantize(tensor) if tensor.ndim == 1 else tensor
        if path != "embed_tokens" and tensor.type in TILED_TYPES:
            value = to_gpu_tiles(tensor)
        if tensor.ndim == 3:
            value = as_rows(value)
        layer, name = split_path(path)
        if layer is None:
            params[path] = jax.tree.map(jnp.asarray, value)
        else:
            stack, _ = places[name].place(layer)
            parts.setdefault(stack, []).append(value if tensor.ndim > 1 else value[None])
    join = lambda *arrays: jnp.asarray(np.concatenate(arrays))
    stacks = {name: jax.tree.map(join, *values) for name, values in parts.items()}
    return params | {"layers": LayerTable(stacks, plan.tensors)}


class Model(NamedTuple):
    """A random model: its parameters as the kernel takes them, and dequantized."""

    config: Any
    weights: dict
    plain: dict


def random_model(config, types, seed) -> Model:
    print(f"seed {seed}")
    rng, c = np.random.default_rng(seed), config
    f32, d, head = GGMLType.F32, c.hidden_size, c.head_dim
    kv, width = c.num_key_value_heads * head, c.num_attention_heads * head
    e, f = c.num_experts, c.moe_intermediate_size
    tensors = {"embed_tokens": (types["embed"], (c.vocab_size, d))}
    if types["lm_head"] is not None:
        tensors["lm_head"] = (types["lm_head"], (c.vocab_size, d))
    tensors["norm"] = (f32, (d,))
    shapes = {
        "input_layernorm": (f32, (d,)),
        "post_attention_layernorm": (f32, (d,)),
        "self_attn.q_norm": (f32, (head,)),
        "self_attn.k_norm": (f32, (head,)),
        "self_attn.q_proj": (types["q"], (width, d)),
        "self_attn.k_proj": (types["k"], (kv, d)),
        "self_attn.v_proj": (types["v"], (kv, d)),
        "self_attn.o_proj": (types["o"], (d, width)),
        "mlp.router": (types["router"], (e, d)),
        "mlp.experts.gate_proj": (types["gate"], (e, f, d)),
        "mlp.experts.up_proj": (types["gate"], (e, f, d)),
        "mlp.experts.down_proj": (types["down"], (e, d, f)),
    }
    tensors |= {f"layers.0.{name}": value for name, value in shapes.items()}
    packed = {path: random_tensor(rng, type, shape) for path, (type, shape) in tensors.items()}
    kinds = {path: p.type for path, p in packed.items()}
    plain = {path: dequantize(p) for path, p in packed.items()}
    return Model(c, gpu_params(c, packed, kinds), plain)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, TYPES, SEED)


@pytest.fixture(scope="module")
def odd():
    return random_model(replace(ODD, tie_word_embeddings=True), ODD_TYPES, ODD_SEED)


def rms(x, w):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + CONFIG.rms_norm_eps) * w


def rope(x, position):
    half = x.shape[-1] // 2
    angle = position * CONFIG.rope_theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def reference(model, token, position, keys, values, expert_ids=None, kept=lambda new: new):
    """(logits, new keys [L, K, H], new values, expert ids) in float64 from float32 weights.

    ``kept``: what the cache keeps of a new key or value.
    """
    c, w = model.config, model.plain
    heads, kv, head = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    x = w["embed_tokens"][token].astype(np.float64)
    new_keys, new_values, chosen = [], [], []
    for i in range(c.num_hidden_layers):
        p = lambda name, i=i: w[f"layers.{i}.{name}"]
        h = rms(x, p("input_layernorm"))
        q, k, v = ((p(f"self_attn.{n}_proj") @ h).reshape(-1, head) for n in "qkv")
        q, k = rope(rms(q, p("self_attn.q_norm")), position), rope(rms(k, p("self_attn.k_norm")), position)
        k, v = kept(k), kept(v)
        new_keys.append(k)
        new_values.append(v)
        ks = np.concatenate([keys[i, :position], k[None]])
        vs = np.concatenate([values[i, :position], v[None]])
        s = np.einsum("kgh,skh->kgs", q.reshape(kv, heads // kv, head), ks) * head**-0.5
        s = np.exp(s - s.max(-1, keepdims=True))
        out = np.einsum("kgs,skh->kgh", s / s.sum(-1, keepdims=True), vs).reshape(-1)
        x = x + p("self_attn.o_proj") @ out
        h = rms(x, p("post_attention_layernorm"))
        logits = p("mlp.router") @ h
        ids = np.argsort(-logits)[: c.num_experts_per_tok] if expert_ids is None else expert_ids[i]
        chosen.append(ids)
        routing = np.exp(logits[ids] - logits[ids].max())
        for expert, weight in zip(ids, routing / routing.sum(), strict=True):
            gate = p("mlp.experts.gate_proj")[expert] @ h
            act = gate / (1 + np.exp(-gate)) * (p("mlp.experts.up_proj")[expert] @ h)
            x = x + weight * (p("mlp.experts.down_proj")[expert] @ act)
    return (
        w.get("lm_head", w["embed_tokens"]) @ rms(x, w["norm"]),
        np.stack(new_keys),
        np.stack(new_values),
        np.stack(chosen),
    )


def cosine(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return a @ b / np.sqrt((a @ a) * (b @ b))


def run(model, tokens, positions, cache, expert_ids=None, active=None, **options):
    """``cache``: keys and values; and of int8 the scales of each."""
    active = jnp.ones(len(tokens), bool) if active is None else active  # one program for both
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    options = {"kernels": "hopper", "splits": 2, "one_sequence": False} | options
    return step(model.weights, tokens, positions, cache, expert_ids, active, model.config, **options)


# For all tests: compiling takes most of their time.
@partial(jax.jit, static_argnames=("config", "kernels", "splits", "one_sequence"))
def step(weights, tokens, positions, cache, expert_ids, active, config, kernels, splits, one_sequence):
    device = api.Device(blocks=1, splits=splits, kernels=kernels, emulate=True, interpret=interpreter())
    k, v, *scales = cache
    options = {"expert_ids": expert_ids, "active": active, "one_sequence": one_sequence, "device": device}
    return api.decode_step(weights, config, tokens, positions, k, v, scales=tuple(scales) or None, **options)


def assert_as_alone(found, expected, bar=DECODE_STEP_IN_COMPANY):
    """What a sequence has in company, and alone: the same bits on a GPU (``scripts.profile_decode --check``).

    XLA on a CPU joins a product and a sum, or does not, by what else is in a program: here a number may round
    otherwise, and move others by a step of their own.
    """
    assert found.shape == expected.shape
    by_row = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (found, expected))
    for one, other in zip(*by_row, strict=True):
        assert np.array_equal(one, other, equal_nan=True) or cosine(one, other) > bar


def random_cache(config, batch, length=192, dtype=jnp.bfloat16):
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    rng = np.random.default_rng(SEED + 1)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))


@pytest.mark.parametrize(("name", "kernels"), [("model", "hopper"), ("odd", "portable")])
def test_one_token_and_its_cache_rows(request, name, kernels):
    """Tiles of context in two splits; free choice of experts; types in tiles, and types that lie in rows."""
    model = request.getfixturevalue(name)
    cache, position = random_cache(model.config, 1), 150
    out = run(model, [5], [position], cache, kernels=kernels)
    keys, values = (np.asarray(a[:, 0], np.float64) for a in cache)
    logits, new_keys, new_values, ids = reference(model, 5, position, keys, values)
    assert np.isfinite(out.logits).all()
    assert cosine(out.logits[0], logits) > 0.9999
    np.testing.assert_array_equal(np.sort(out.expert_ids[:, 0]), np.sort(ids))
    for new, old, expected in zip((out.k, out.v), cache, (new_keys, new_values), strict=True):
        row = np.asarray(new[:, 0, position], np.float64)
        assert cosine(row, expected) > 0.9999
        others = np.arange(new.shape[2]) != position
        np.testing.assert_array_equal(np.asarray(new)[:, :, others], np.asarray(old)[:, :, others])


def test_the_only_tiles_of_a_warpgroup_are_asked_for_early(model):
    """Contexts in one split: three tiles, of which the first is asked for before the norm; or none."""
    cache, ids = random_cache(CONFIG, 1, dtype=jnp.float16), np.array([[[7, 1, 4, 2]]], np.int32)
    keys, values = (np.asarray(a[:, 0], np.float64) for a in cache)
    for position in (0, 150):
        out = run(model, [5], [position], cache, ids, splits=1)
        logits, *_ = reference(model, 5, position, keys, values, ids[:, 0])
        assert cosine(out.logits[0], logits) > 0.99999, position


@pytest.mark.parametrize("batch", [5])
def test_replayed_experts_and_batches_are_as_one_alone(model, batch):
    """Groups and shares of sequences are not whole, and experts are chosen by several.

    From four sequences on, the sums of several chunks of gate + up are there at once. In float16, which is
    eight times closer to float32 than bfloat16.
    """
    cache = random_cache(model.config, batch, dtype=jnp.float16)
    ids = np.array([[[7, 1, 4, 2], [0, 7, 5, 4], [1, 2, 3, 4], [5, 0, 6, 1], [2, 7, 3, 0]]], np.int32)
    ids = ids[:, :batch]
    tokens, positions = [5, 9, 11, 3, 60][:batch], [0, 70, 150, 1, 129][:batch]
    together = run(model, tokens, positions, cache, ids)
    np.testing.assert_array_equal(together.expert_ids, ids)
    for b, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        keys, values = (np.asarray(a[:, b], np.float64) for a in cache)
        logits, *_ = reference(model, token, position, keys, values, ids[:, b])
        assert cosine(together.logits[b], logits) > 0.99999
        one = tuple(a[:, b : b + 1] for a in cache)
        alone = run(model, tokens[b : b + 1], positions[b : b + 1], one, ids[:, b : b + 1])
        assert_as_alone(together.logits[b], alone.logits[0])
        for all_rows, own in zip((together.k, together.v), (alone.k, alone.v), strict=True):
            assert_as_alone(all_rows[:, b], own[:, 0])


def test_tokens_of_one_sequence_are_as_one_step_each(odd):
    """The second one's context is the first that is split: its last tile has the first one's key alone."""
    tokens, positions = [5, 9], [128, 129]
    cache = random_cache(odd.config, 1, dtype=jnp.float16)
    together = run(odd, tokens, positions, cache, kernels="portable", one_sequence=True)
    for row, (token, position) in enumerate(zip(tokens, positions, strict=True)):
        alone = run(odd, [token], [position], cache, kernels="portable")
        cache = (alone.k, alone.v)
        assert_as_alone(together.logits[row], alone.logits[0])
        np.testing.assert_array_equal(together.expert_ids[:, row], alone.expert_ids[:, 0])
    for one, other in zip((together.k, together.v), cache, strict=True):
        assert_as_alone(one, other)


@pytest.mark.parametrize("batch", [1, 4, 5, 6, 7])
def test_groups_of_sequences_are_numbered_one_after_the_other(batch):
    """Neighbours sum in different scratch by their numbers, and the interpreter could not see them meet."""
    groups = []
    grid = SimpleNamespace(c=SimpleNamespace(batch=batch))
    Grid.for_groups(grid, 4, lambda *group: groups.append(group))
    assert [number for number, _, _ in groups] == list(range(len(groups)))
    assert [b for _, first, size in groups for b in range(first, first + size)] == list(range(batch))


def test_a_kernel_that_nobody_waits_for_leaves_the_cache_alone(model):
    cache = random_cache(CONFIG, 1, dtype=jnp.float16)
    out = run(model, [9], [70], cache, np.array([[[7, 1, 4, 2]]], np.int32), active=jnp.array([False]))
    for new, old in zip((out.k, out.v), cache, strict=True):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


@pytest.mark.parametrize(("cores", "batch"), [(114, 1), (78, 8), (16, 2)])
def test_the_kernel_is_made_for_any_number_of_multiprocessors(model, cores, batch):
    """Traced for each grid: tables, tiles and results of other sizes than an H100's index what is there."""
    step = lambda w, t, p, kv: api.decode_step(w, CONFIG, t, p, *kv, device=api.Device.of_cores(cores))
    tokens = jnp.zeros(batch, jnp.int32)
    traced = jax.jit(step).trace(model.weights, tokens, tokens, random_cache(CONFIG, batch))
    assert traced.out_info.logits.shape == (batch, CONFIG.vocab_size)

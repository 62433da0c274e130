"""Parameters on a device: the same weights in every layout, and a model in GPU tiles computes the same."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.layouts.gpu_tiles import TILE_ROWS, TILED_TYPES, to_gpu_tiles
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import ROWS
from qwen3_moe_jax.convert.tensor_names import tensor_specs
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.jax_backend import host_load
from qwen3_moe_jax.jax_backend import params as loading
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.kernels_pallas import dequantize as dequantize_on_device
from qwen3_moe_jax.kernels_pallas.packed.stacks import abstract_packed
from qwen3_moe_jax.parity.metrics import cosine
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf
from tests import tolerances

LAYOUTS = pytest.mark.parametrize(
    ("load", "roles"),
    [(loading.load_on_host, {}), (loading.load_on_device, loading.GPU_ROLES)],
    ids=["cpu", "gpu"],
)


CPU = jax.devices("cpu")[0]


@pytest.mark.parametrize("type", TILED_TYPES, ids=lambda type: type.name)
def test_shapes_of_tiles_are_those_that_the_shuffle_gives(type):
    rows = abstract_packed(type, (3, 24, 512))
    expected = jax.eval_shape(lambda packed: to_gpu_tiles(packed, jnp), rows)
    found = loading.tiled_shape(rows)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)


@LAYOUTS
def test_every_tensor_is_where_its_place_says(source, load, roles):
    params = load(source, roles, CPU)
    for path, tensor in source.tensors():
        expected = dequantize(tensor).reshape(-1, tensor.shape[-1])
        layer, name = loading.split_path(path)
        if layer is None:
            value, rows = params[path], slice(None)
        else:
            place = params["layers"][name]
            value, first = place.options[place.which[layer]], place.first[layer]
            rows = slice(first, first + place.rows)
        dense = value if isinstance(value, jax.Array) else dequantize_on_device(value)
        np.testing.assert_array_equal(np.atleast_2d(dense)[rows], expected, path)


@LAYOUTS
def test_a_layers_view_has_its_matrices(source, load, roles):
    """By a number that is known on the device alone, of the type that the layer has."""
    table = load(source, roles, CPU)["layers"]
    view = jax.jit(lambda table, layer: table.layer(layer))
    wanted = {
        f"layers.{layer}.{name}" for layer in (0, 3) for name in ("self_attn.v_proj", "input_layernorm")
    }
    for path, tensor in source.tensors():
        if path not in wanted:
            continue
        layer, name = loading.split_path(path)
        *parents, leaf = name.split(".")
        node = view(table, layer)
        for parent in parents:
            node = node[parent]
        if tensor.ndim == 1:
            np.testing.assert_array_equal(node[leaf], dequantize(tensor))
            continue
        option = node[leaf].options[int(node[leaf].which)]
        assert option.stack.type == tensor.type
        np.testing.assert_array_equal(dequantize_on_device(option.slice(0, option.rows)), dequantize(tensor))


def test_a_model_in_gpu_tiles_gives_the_same_logits(source, golden, exact_runner):
    tiled = JaxRunner(source, compute_dtype="float32")
    tiled.params = loading.load_on_device(source, loading.GPU_ROLES, CPU)
    logits = tiled.forward(golden["ids0"]).logits
    np.testing.assert_allclose(
        logits, exact_runner.forward(golden["ids0"]).logits, atol=tolerances.CHUNKED_LOGITS
    )


@pytest.mark.parametrize(
    ("shape", "maximum"),
    [
        ((100, 64), 1),
        ((100, 64), 64 * 40),
        ((5, 48, 64), 48 * 64 * 2),
        ((3, 48, 64), 64 * 33),
        ((2, 7, 64), 64),
    ],
)
def test_pieces_cover_a_tensor_once(shape, maximum):
    """In whole experts, or in groups that the layout with sixteen rows side by side can begin with."""
    rows, columns = shape[-2:]
    seen = np.zeros(shape[:-1], int)
    for first, box in host_load.boxes(shape, columns, maximum):
        *leading, (begin, end), of_columns = box
        expert = leading[0][0] if leading else 0
        assert first == expert * rows + begin
        assert of_columns == (0, columns)
        assert (begin, end) == (0, rows) or (begin % 16 == 0 and (end % 16 == 0 or end == rows))
        assert (end - begin) * columns <= max(maximum, 16 * columns)
        seen[(*(slice(*e) for e in leading), slice(begin, end))] += 1
    assert (seen == 1).all()


FEW_ROWS = {
    "two routers of 8 rows": ({"num_experts": 8}, "mlp.router", GGMLType.Q8_0),
    "experts of 24 rows": (
        {"num_experts": 4, "moe_intermediate_size": 24},
        "mlp.experts.gate_proj",
        GGMLType.Q4_K,
    ),
    "experts of 12 rows": (
        {"num_experts": 4, "moe_intermediate_size": 12},
        "mlp.experts.up_proj",
        GGMLType.Q8_0,
    ),
}
"""Matrices that end inside a unit of rows that lie side by side, in stacks of whole units."""


@pytest.mark.parametrize("case", FEW_ROWS)
def test_matrices_of_few_rows_stay_in_rows_whatever_their_stack_has(case, tmp_path):
    sizes, name, kind = FEW_ROWS[case]
    config = replace(SMALL, **sizes)
    types = {spec.path: kind if spec.path.endswith(name) else GGMLType.F16 for spec in tensor_specs(config)}
    path = tmp_path / "model.gguf"
    types |= {spec.path: GGMLType.F32 for spec in tensor_specs(config) if len(spec.shape) == 1}
    write_random_gguf(path, config, types=types)
    tokens = np.arange(5)
    with open_model(path) as source:
        runner = JaxRunner(source, max_context=32, compute_dtype="float32", kernels="xla")
        assert runner.params["layers"][name].options[0].layout == ROWS
        shapes = loading.device_params(config, source.types, CPU)
        assert jax.tree.structure(shapes) == jax.tree.structure(runner.params)
        tiles = loading.tiled_params(loading.abstract_params(config, source.types, loading.GPU_ROLES))
        is_whole = config.moe_intermediate_size % TILE_ROWS == 0 and name != "mlp.router"
        assert loading.is_tiled(tiles["layers"][name].options[0]) == is_whole
        truth = ReferenceRunner(source).forward(tokens).logits
        found = runner.forward(tokens).logits
        runner.close()
    assert cosine(truth, found).min() >= tolerances.GOLDEN_FLOAT32_COSINE

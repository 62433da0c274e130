"""Parameters on a device: the same weights in every layout, and a model in GPU tiles computes the same."""

import jax
import numpy as np
import pytest
from flax.core import FrozenDict

from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.jax_backend import params as loading
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.stacks import stack_layers
from qwen3_moe_jax.kernels_pallas import dequantize as dequantize_on_device
from tests import tolerances

LAYOUTS = pytest.mark.parametrize(
    ("placer", "roles"), [(loading._OnHost, {}), (loading._OnDevice, loading.GPU_ROLES)], ids=["cpu", "gpu"]
)


def load(source, placer, roles, monkeypatch):
    """The parameters as a device of the other kind would hold them."""
    monkeypatch.setattr(loading, "_OnHost", placer)
    return loading.load_params(source, roles, jax.devices("cpu")[0])


@LAYOUTS
def test_every_tensor_is_where_its_place_says(source, placer, roles, monkeypatch):
    params = load(source, placer, roles, monkeypatch)
    places, _ = stack_layers(source.config, source.types, roles)
    for path, tensor in source.tensors():
        expected = dequantize(tensor).reshape(-1, tensor.shape[-1])
        place = places.get(path)
        value = params[path] if place is None else params["stacks"][place.stack]
        dense = value if isinstance(value, jax.Array) else dequantize_on_device(value)
        rows = slice(None) if place is None else slice(place.first, place.first + place.rows)
        np.testing.assert_array_equal(np.atleast_2d(dense)[rows], expected, path)


def test_a_model_in_gpu_tiles_gives_the_same_logits(source, golden, jax_runner, monkeypatch):
    tiled = JaxRunner(source)
    tiled.params = load(source, loading._OnDevice, loading.GPU_ROLES, monkeypatch)
    tiled.model = tiled.model.clone(roles=FrozenDict(loading.GPU_ROLES))
    logits = tiled.forward(golden["ids0"]).logits
    np.testing.assert_allclose(
        logits, jax_runner.forward(golden["ids0"]).logits, atol=tolerances.CHUNKED_LOGITS
    )

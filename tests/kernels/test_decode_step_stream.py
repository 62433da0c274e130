"""Tiles of the decode kernel on their way while others are multiplied: what is asked for, and how often."""

from unittest import mock

import jax
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.kernels_pallas.decode_step import grid


def loop(first, last, run, carry):
    for i in range(first, last):
        carry = run(i, carry)
    return carry


@pytest.mark.parametrize(
    ("items", "depth", "together"), [(6, 3, 1), (12, 4, 2), (4, 2, 2), (5, 1, 1), (6, 6, 1)]
)
@pytest.mark.parametrize("is_last", [False, True])
def test_every_tile_is_multiplied_once_and_none_loaded_in_vain(items, depth, together, is_last):
    loaded, multiplied = list(range(depth)), []

    def load(i):
        loaded.append(i)
        return i

    def multiply(i, tiles):
        assert list(tiles) == list(range(i, i + together))
        multiplied.extend(tiles)

    with mock.patch.object(grid.lax, "fori_loop", loop):
        rest = grid.stream(items, load, multiply, tuple(range(depth)), together=together, is_last=is_last)
    assert multiplied == list(range(items))
    if is_last:
        assert loaded == list(range(items))
    elif items > depth:
        assert list(rest) == list(range(items, items + depth))

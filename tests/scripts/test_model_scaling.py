"""The model of many GPUs: the page and the picture are what the script makes, and its arithmetic."""

import math

import jax
import numpy as np
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.jax_backend.sharding import MeshShape
from scripts import model_scaling as scaling
from scripts._receipts import receipt

ROUNDED = 1e-3
"""The receipt has three to four digits."""


def test_the_receipt_and_the_picture_are_what_the_script_makes():
    found, held = scaling.figures(), receipt("scaling_model")
    for made, row in zip((*found["cells"], *found["checks"]), (*held["cells"], *held["checks"]), strict=True):
        assert made.keys() == row.keys()
        for name, value in made.items():
            is_number = isinstance(value, float)
            assert value == (pytest.approx(row[name], rel=ROUNDED, abs=ROUNDED) if is_number else row[name])
    assert scaling.PICTURE.read_text() == scaling.picture(held)


def test_constants_give_back_what_they_come_from():
    """Points on the lines, one GPU: nothing but rounding is between them."""
    model, one = scaling.calibrated(), MeshShape()
    for n in (512, scaling.PROMPT):
        seconds = scaling.prefill_rows()[1, n]["seconds"]
        assert model.prompt(scaling.SMALL, one, n) == pytest.approx(seconds, rel=1e-9)
    one_gpu = lambda n: scaling.measured("one GPU, 30B", n)
    assert model.one_kernel(scaling.SMALL, one, 1) == pytest.approx(one_gpu(1), rel=1e-9)
    assert model.by_layers(scaling.SMALL, one, 64) == pytest.approx(one_gpu(64), rel=1e-9)
    used = [row for row in scaling.checks() if row["is_used"]]
    assert [abs(row["error"]) < ROUNDED for row in used] == [True]


@pytest.mark.parametrize(("chosen", "groups"), [(8, 1), (8, 2), (8, 8), (126, 32)])
def test_the_busiest_group(chosen, groups):
    """Against draws: of 20,000 the mean is within 1 % of what is expected."""
    draws = np.random.default_rng(20261127).multinomial(chosen, [1 / groups] * groups, 20_000).max(axis=1)
    assert scaling.busiest(chosen, groups) == pytest.approx(draws.mean(), rel=0.01)


def test_a_sum_over_gpus_costs_its_hops_and_its_bytes():
    two = scaling.collective(1, 2, scaling.NVLINK, 0)
    assert two == pytest.approx(scaling.COLLECTIVE * 1e-6)
    assert scaling.collective(1, 1, scaling.NVLINK, 1e9) == 0
    per_byte = scaling.collective(1, 2, scaling.NVLINK, 1e9) - two
    assert per_byte == pytest.approx(1e9 / scaling.NVLINK.rate)
    four_hosts = scaling.collective(4, 1, scaling.NVLINK, 0) - (two - 2 * scaling.NVLINK.hop * 1e-6)
    assert four_hosts == pytest.approx(2 * math.log2(4) * scaling.NETWORK.hop * 1e-6)


def test_what_does_not_fit_or_cannot_be_split_has_no_rate():
    for cell in receipt("scaling_model")["cells"]:
        planned = cell["planned"] or math.inf
        assert ("decode 1" in cell) == (planned <= scaling.CARD_NBYTES), cell

"""What the scripts for cards that are not here say without one: plans, limits, mixtures, lowered programs."""

import json

import jax
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.loader import embedded_model
from qwen3_moe_jax.machine.limits import step_nbytes
from scripts import bench_mixes, check_card_limit

ROW = {"preset": "p", "target": "sm_89", "kernels": "portable", "batch": 1, "tokens": 1, "refused": {}}


def test_a_plan_says_what_fits_before_anything_is_loaded(capsys):
    path = str(embedded_model())
    assert check_card_limit.main([path, "--gb", "0.5", "--context", "4096", "--plan"]) == 0
    fits = json.loads(capsys.readouterr().out)["plan"]
    assert check_card_limit.main([path, "--gb", "0.44", "--context", "4096"]) == 1
    found = json.loads(capsys.readouterr().out)["plan"]
    assert fits["fits"]
    assert not found["fits"]
    assert found["fitting_context"] < 4096 < fits["fitting_context"]
    int8 = check_card_limit.plan(embedded_model(), 4096, "int8", int(5e8))
    assert int8["cache"] < fits["cache"] == 2 * 4096 * 6 * 2 * 64 * 2


def test_the_share_of_a_card_is_the_limit():
    assert check_card_limit.share_of_card(int(22.8e9), int(85.5e9)) * 85.5e9 == pytest.approx(22.8e9)
    assert check_card_limit.share_of_card(int(22.8e9), None) == 0.95


def test_a_mixture_reads_what_its_types_hold():
    config = PRESETS[bench_mixes.PRESET]
    found = [bench_mixes.Mixture.of(mix, config) for mix in bench_mixes.MIXES]
    sizes = [mixture.nbytes for mixture in found]
    assert sizes == sorted(sizes)
    assert sizes[0] == pytest.approx(11.25e9, rel=0.001)
    for mixture in found:
        one, eight = (step_nbytes(mixture, bench_mixes.CACHE_ITEMSIZE, n, 0) for n in (1, 8))
        assert 0.1 * mixture.nbytes < one < eight < mixture.nbytes


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"ran": ["decode_step: portable"]}, ""),
        ({"ran": ["decode_layers: portable"], "batch": 32}, ""),
        ({"ran": ["moe_mlp: portable"], "tokens": 512}, ""),
        ({"ran": ["moe_mlp: portable"], "refused": {"one kernel": "... of shared memory ..."}}, ""),
        ({"ran": ["decode_step: xla"]}, "decoding is not decode_step"),
        ({"ran": ["decode_step: portable"], "batch": 32}, "decoding is not decode_layers"),
    ],
)
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need JAX 0.11")
def test_a_program_whose_decoding_is_not_by_kernels_is_a_fault(change, fault):
    from scripts import lower_models

    found = lower_models.fault_of(ROW | change)
    assert (fault in found) if fault else found is None

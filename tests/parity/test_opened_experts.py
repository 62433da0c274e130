"""A wrong scale that 16-bit operands hide in the output of a fused expert layer is found inside it."""

import jax.numpy as jnp

from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.parity.clauses import FAILED, check_stages
from qwen3_moe_jax.parity.contract import load_contract
from qwen3_moe_jax.parity.evidence import Evidence, Oracle
from qwen3_moe_jax.testing.fault_list import FAULTS
from qwen3_moe_jax.testing.faults import plant


def test_a_wrong_sub_scale_is_found_with_16_bit_operands(source, text_ids):
    oracle = Oracle(source, text_ids[:64])
    make = lambda lying: JaxRunner(lying, max_context=512, compute_dtype=jnp.bfloat16)
    runner = plant(FAULTS["sub-scale"], source, make)
    evidence = Evidence(oracle, runner)
    excused = [j for run, j in evidence.judgements if run == "prompt" and j.is_excused]
    assert [j.where for j in excused] == ["ffn_moe_out-3"]  # by itself it would pass
    finding = check_stages(load_contract().clauses["STAGES-001"], evidence)
    assert finding.verdict == FAILED
    assert "ffn_moe_up-3" in finding.note

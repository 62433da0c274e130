"""Ten planted faults, each named by ``bisect`` with its layer, stage, tensor, expert and cause."""

import json

import numpy as np
import pytest

from qwen3_moe_jax.core.stages import STAGES
from qwen3_moe_jax.inspection.trace import Trace, trace
from qwen3_moe_jax.parity.bisect import bisect, bisect_trace, compare
from qwen3_moe_jax.parity.causes import explain
from qwen3_moe_jax.parity.judge import StageJudge
from qwen3_moe_jax.parity.noise import ROUNDING
from qwen3_moe_jax.testing.fault_list import FAULTS
from qwen3_moe_jax.testing.faults import plant

SHORT = 40


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("backend", ["reference", "jax"])
def test_fault_is_named(backend, name, source, text_ids, makers):
    fault = FAULTS[name]
    found = bisect(source, plant(fault, source, makers[backend]), text_ids[:SHORT])
    assert found is not None
    assert (found.stage, found.layer, found.judgement.tensor) == (fault.stage, fault.layer, fault.tensor)
    assert found.cause.expert == fault.expert
    assert fault.cause in found.cause.words
    assert found.cause.proven
    assert fault.cause in found.in_words()
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("backend", ["reference", "jax"])
def test_nothing_departs_in_a_sound_backend(backend, source, text_ids, makers):
    assert bisect(source, makers[backend](source), text_ids[:SHORT]) is None


def test_a_long_prompt_is_judged(source, text_ids, makers):
    assert bisect(source, makers["reference"](source), text_ids[:300]) is None


def test_there_are_ten():
    assert len(FAULTS) == 10


def test_a_recorded_trace_is_judged_as_the_backend_is(source, text_ids, makers, tmp_path):
    wrong = trace(plant(FAULTS["gqa-map"], source, makers["reference"]), text_ids[:20])
    wrong.save(tmp_path / "wrong.npz")
    read = Trace.load(tmp_path / "wrong.npz")
    assert read.forward.stages.keys() == wrong.forward.stages.keys()
    found = bisect_trace(source, read)
    assert (found.stage, found.layer) == ("kqv_out", 0)
    right = trace(makers["reference"](source), text_ids[:20])
    rows = {row.name: row for row in compare(right, read)}
    assert rows["Kcur_rope-0"].nmse == 0
    assert rows["kqv_out-0"].nmse > 0.1


def test_rounding_below_what_is_claimed_is_named(source, text_ids, makers):
    """Operands in bfloat16 under the name of float32."""
    recorded = trace(makers["reference"](source), text_ids[:24])
    rng = np.random.default_rng(5)
    stages = dict(recorded.forward.stages)
    judge = StageJudge(source, recorded.facts, recorded.token_ids, recorded.forward)
    judge.operand = ROUNDING["bfloat16"]
    expected = judge.expectation(("Vcur", 2))
    noise = 0.3 * expected.sigma * rng.standard_normal(expected.sigma.shape)
    stages["Vcur", 2] = (expected.value + noise).reshape(stages["Vcur", 2].shape).astype(np.float32)
    recorded.forward.stages.update(stages)
    found = bisect_trace(source, recorded)
    assert (found.stage, found.layer) == ("Vcur", 2)
    assert "bfloat16" in found.cause.words


def test_what_no_mistake_explains_is_described(source, text_ids, makers):
    recorded = trace(makers["reference"](source), text_ids[:24])
    recorded.forward.stages["ffn_moe_swiglu", 1][10:] *= 1.01
    judge = StageJudge(source, recorded.facts, recorded.token_ids, recorded.forward)
    first = judge.first_departure()
    cause = explain(judge, first)
    assert (first.stage, first.layer, cause.proven) == ("ffn_moe_swiglu", 1, False)
    assert "from position 10 on" in cause.words


def test_judging_a_sample_of_rows_and_tokens_agrees(source, text_ids, makers):
    recorded = trace(makers["reference"](source), text_ids[:24])
    for rows, tokens in ((None, None), (16, None), (None, 5), (16, 5)):
        judge = StageJudge(
            source, recorded.facts, recorded.token_ids, recorded.forward, max_rows=rows, max_tokens=tokens
        )
        judged = list(judge.judgements())
        assert (
            len(judged)
            == len([s for s in STAGES if s in ("inp_embd", "result_norm", "result_output")]) + 6 * 22
        )
        assert not [j for j in judged if j.departs]


def test_traces_of_different_prompts_are_refused(source, text_ids, makers):
    runner = makers["reference"](source)
    with pytest.raises(ValueError, match="different prompts"):
        compare(trace(runner, text_ids[:3], ["l_out"]), trace(runner, text_ids[1:4], ["l_out"]))

"""Processes that share the NumPy work of ``verify`` find what one process finds."""

import os
import subprocess
import sys

import numpy as np
import pytest

from qwen3_moe_jax.parity import crew as crews
from qwen3_moe_jax.parity.crew import Crew
from qwen3_moe_jax.parity.file_check import rows_that_differ
from qwen3_moe_jax.parity.judge import FUSED_STAGES, StageJudge
from qwen3_moe_jax.reference import ReferenceRunner

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

COUNT = 3


@pytest.fixture(scope="module")
def crew(source):
    found = Crew(source, COUNT)
    yield found
    found.close()


def test_the_file_is_read_as_by_one(crew, source):
    assert crew.check_file() == rows_that_differ(source, source.specs)
    assert crew.check_file()[0] == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_texts_are_those_of_one(crew, source, text_ids, dtype):
    texts = [text_ids[:40], text_ids[50:73]]
    logits, found = crew.forwards(texts, np.dtype(dtype), ("ffn_moe_logits", "Kcur_rope"))
    runner = ReferenceRunner(source, dtype=dtype)
    alone = runner.forwards(texts, capture=("ffn_moe_logits", "Kcur_rope"))
    np.testing.assert_allclose(logits, np.concatenate([f.logits for f in alone]), rtol=1e-6, atol=1e-5)
    for ours, true in zip(found, alone, strict=True):
        np.testing.assert_array_equal(ours.expert_ids, true.expert_ids)
        assert ours.stages.keys() == true.stages.keys()
        for key, value in true.stages.items():
            np.testing.assert_allclose(ours.stages[key], value, rtol=1e-5, atol=1e-5, err_msg=str(key))


@pytest.mark.parametrize("layers", [(), (1,)])
def test_stages_are_judged_as_by_one(crew, source, text_ids, layers):
    """A departure among them, which is judged with care, and a value that is not finite."""
    options = {"layers": layers} if layers else {}
    forward = ReferenceRunner(source).forward(text_ids[:20], capture=FUSED_STAGES, **options)
    forward.stages["attn_out", 1][3, 5] += 1
    forward.stages["ffn_norm", 1][2, 7] = np.nan
    facts = {"compute_dtype": "bfloat16", "cache_dtype": "float16"}
    alone = list(StageJudge(source, facts, text_ids[:20], forward, layers=layers).judgements())
    found = crew.judge(facts, text_ids[:20], forward, layers)
    assert next(j.where for j in found if j.departs) == "attn_out-1"
    assert [(j.where, j.departs, j.nonfinite) for j in found] == [
        (j.where, j.departs, j.nonfinite) for j in alone
    ]
    assert [j.nmse for j in found] == pytest.approx([j.nmse for j in alone], rel=1e-6, nan_ok=True)


def test_an_error_is_raised_where_it_was_asked_for_and_the_next_request_is_answered(crew, source, text_ids):
    with pytest.raises(ValueError, match="no stage is named"):
        crew.forwards([text_ids[:5]], np.dtype(np.float32), ("no such stage",))
    assert crew.check_file()[0] == 0


MEMBERS = """
import os, signal
import numpy as np
from qwen3_moe_jax.machine import team

def killed(one):
    if one.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    one.each(lambda item: None, range(4))
    return 1

def sums(one):
    found = []
    for turn in range(50):
        array = one.empty((7, 100), np.int64)
        one.each(lambda row: array.__setitem__(row, turn + row), range(7))
        found.append(int(array.sum()))
    return found

try:
    team.as_a_team(3, 1 << 16, killed)
except team.TeamError as error:
    print(error)
size = 3 * team.array_nbytes((7, 100), np.int64)
print(team.as_a_team(3, size, sums) == [100 * (7 * turn + 21) for turn in range(50)])
"""


def test_members_share_what_they_fill_and_one_that_is_killed_is_an_error_and_no_wait():
    """Memory of arrays is used again and again. In a process of its own, without threads."""
    done = subprocess.run([sys.executable, "-c", MEMBERS], capture_output=True, text=True, timeout=100)
    first, second = done.stdout.splitlines()
    assert "was ended" in first, done.stderr
    assert second == "True"


def test_processes_end_with_the_one_that_started_them(source):
    found = Crew(source, COUNT)
    process = found._process.pid
    found.check_file()
    found.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_few_processors_have_none(source, monkeypatch):
    monkeypatch.setattr(crews, "processors", lambda: crews.MIN_PROCESSORS - 1)
    assert Crew.of(source) is None

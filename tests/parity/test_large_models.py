"""What verify does for models that fit in memory once; limits are lowered until the embedded one is large."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from qwen3_moe_jax import cli, loader
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.machine import headroom, threads
from qwen3_moe_jax.machine.threads import ALONE, Workers
from qwen3_moe_jax.parity import crew, evidence, text_runs
from qwen3_moe_jax.parity import verify as verify_function
from qwen3_moe_jax.parity.ahead import Ahead
from qwen3_moe_jax.parity.crew import Crew
from qwen3_moe_jax.parity.evidence import Evidence, Oracle
from qwen3_moe_jax.parity.judge import FUSED_STAGES, StageJudge
from qwen3_moe_jax.parity.text_runs import LogitDistance
from qwen3_moe_jax.parity.verify import Unloaded, check_room_for_logits
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.reference.model import TensorsOnDemand

TOKENS = 100


@pytest.fixture
def is_large(monkeypatch):
    """The embedded model counts as large, and a window holds 32 tokens' logits."""
    monkeypatch.setattr(evidence, "SMALL_MODEL_BYTES", 1)
    monkeypatch.setattr(evidence, "MAX_LOGIT_BYTES", 40 * 4 * 4096)


@pytest.fixture(autouse=True)
def own_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_one_backend_is_in_memory_at_a_time(is_large, source, monkeypatch):
    in_memory, counts = set(), []

    def load(name):
        runner = ReferenceRunner(source, max_context=TOKENS + 60)
        close = runner.close
        in_memory.add(name)
        counts.append(len(in_memory))
        runner.close = lambda: (in_memory.remove(name), close())
        return runner

    backends = [Unloaded(lambda n=n: load(n), TOKENS + 60) for n in "abc"]
    report = verify_function(source, backends, text_tokens=TOKENS)
    assert report.passed, report.failures
    assert counts == [1, 1, 1]
    assert not in_memory
    report.receipt()
    memory = [f for f in report.findings if f.clause == "VRAM-001"]
    assert [f.verdict for f in memory] == ["passed"] * 3
    assert all(0 <= f.figures["peak"] < f.figures["allowed"] for f in memory)


def test_the_reference_keeps_no_tensors(is_large, source, text_ids):
    oracle = Oracle(source, text_ids[:TOKENS])
    assert isinstance(oracle.runner.weights, TensorsOnDemand)
    assert set(oracle.runner.weights) == set(source.types)
    expected = ReferenceRunner(source, max_context=512).forward(text_ids[:20])
    np.testing.assert_array_equal(oracle.runner.forward(text_ids[:20]).logits, expected.logits)
    with pytest.raises(KeyError):
        oracle.runner.weights["no such"]


def test_windows_cover_the_text_and_their_logits_lie_in_a_file(is_large, source, text_ids, tmp_path):
    oracle = Oracle(source, text_ids[:TOKENS])
    assert [(w.start, w.stop) for w in oracle.windows] == [(0, 32), (32, 64), (64, 96), (96, 128)]
    assert isinstance(oracle.text.logits, np.memmap)
    cache = tmp_path / "cache" / "qwen3_moe_jax"
    assert not [path for path in cache.rglob("*") if path.is_file()]  # it has no name
    found = Evidence(oracle, oracle.runner)
    assert found.free.distance.cosine.shape == (TOKENS,)
    assert found.free.distance.largest == 0
    assert found.free.distance.top1 == 1
    assert found.free.expert_ids.shape == oracle.text.expert_ids.shape
    assert found.free.checksums.shape == (TOKENS,)
    assert found.router_errors.max() == 0
    second = ReferenceRunner(source).forward(text_ids[32:64])
    np.testing.assert_array_equal(oracle.text.logits[32:64], second.logits)


def test_no_room_for_logits_is_one_line(source, text_ids):
    oracle = Oracle(source, text_ids[:TOKENS])
    check_room_for_logits(oracle, None)
    check_room_for_logits(oracle, 1 << 30)
    with pytest.raises(MemoryPlanError, match=r"^verify needs 0\.53 GB .* 0\.10 GB are free: .*$"):
        check_room_for_logits(oracle, int(1e8))


@pytest.mark.parametrize("backend", ["reference", "jax"])
def test_a_backend_that_does_not_fit_is_one_line_and_exit_code_3(is_large, backend, monkeypatch, capsys):
    place = loader if backend == "reference" else headroom
    monkeypatch.setattr(place, "main_memory", lambda **_: headroom.Headroom(1 << 20))
    arguments = ["--backend", backend, "--tokens", "64", "--clause", "STAGES-001"]
    assert cli.main(["verify", *arguments]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "do not fit main memory" in error


GROWTH = """
import numpy as np
from qwen3_moe_jax.machine.resident import ResidentPeak

peak = ResidentPeak.start()
if peak:
    block = np.ones(100 << 20, np.uint8)
    del block
    print(peak.growth(), ResidentPeak.start().growth())
"""


def test_growth_of_the_process_is_seen():
    """In a process of its own: a large one may be shrunk by the system meanwhile."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("this system does not tell a process its peak")
    grown, after = map(int, done.stdout.split())
    assert 90 << 20 < grown < 200 << 20
    assert after < 50 << 20  # the mark is set back


def test_products_stay_on_one_thread_within():
    before = threads.threads_per_product()
    if before is None:
        pytest.skip("NumPy has another BLAS than OpenBLAS")
    with threads.one_thread_per_product():
        assert threads.threads_per_product() == 1
    assert threads.threads_per_product() == before


def test_a_backend_in_a_devices_memory_is_run_ahead_of_the_clauses(is_large, source, text_ids, monkeypatch):
    """Memory is measured alone; everything else side by side, each once; what is timed runs alone again."""
    runner = JaxRunner(source, max_context=TOKENS + 60)
    kept = {name: getattr(runner, name) for name in ("forward", "stream", "memory")}
    events, running = [], []

    def watched(name):
        def call(*args, **options):
            events.append((name, threading.current_thread(), len(running)))
            running.append(name)
            try:
                return kept[name](*args, **options)
            finally:
                running.remove(name)

        return call

    for name in ("forward", "stream"):
        monkeypatch.setattr(runner, name, watched(name))

    def memory():
        events.append(("memory", threading.current_thread(), len(running)))
        return {"peak": 1, "cache": 0}

    monkeypatch.setattr(runner, "memory", memory)
    asked, ask = [], Crew.ask

    def asking(crew, name, **arguments):
        asked.append(name)
        return ask(crew, name, **arguments)

    monkeypatch.setattr(crew, "processors", lambda: crew.MIN_PROCESSORS)
    monkeypatch.setattr(Crew, "ask", asking)
    waited, true = [], Ahead.wait

    def wait(ahead):
        true(ahead)
        waited.append(len(events))

    monkeypatch.setattr(Ahead, "wait", wait)
    begun, main = [], threading.current_thread()
    backends = [Unloaded(lambda: runner, runner.max_context, has_own_memory=True)]
    report = verify_function(
        source, backends, text_tokens=TOKENS, begins=lambda what, subject: begun.append(what)
    )
    assert report.passed, report.failures
    report.receipt()
    assert [name for name, _, _ in events[:2]] == ["stream", "memory"]
    assert events[1][2] == 0  # nothing beside it
    ahead = [name for name, thread, _ in events if thread is not main]
    assert len(ahead) >= 10
    assert [(n, beside) for n, thread, beside in events if thread is main][-1] == ("stream", 0)
    timed = max(i for i, (name, thread, _) in enumerate(events) if name == "stream" and thread is main)
    assert min(waited) <= timed  # not luck: it was waited for
    assert begun[-2:] == ["SPEED-001", "SHA-256"]
    assert {f.clause for f in report.findings} <= set(begun)
    # the text and what was written; stages of a prompt, and token by token
    assert sorted(asked) == ["check_file", "judge_stages", "judge_stages", "run_texts", "run_texts"]


def test_a_run_that_fails_ahead_is_reported_by_its_clause(is_large, source, text_ids, monkeypatch):
    runner = JaxRunner(source, max_context=TOKENS + 60)
    true = runner.forward

    def forward(token_ids, **options):
        if options.get("expert_ids") is not None:
            raise RuntimeError("a fault of the device")
        return true(token_ids, **options)

    monkeypatch.setattr(runner, "forward", forward)
    backends = [Unloaded(lambda: runner, runner.max_context, has_own_memory=True)]
    report = verify_function(source, backends, text_tokens=TOKENS)
    assert {f.clause for f in report.failures} == {"PARITY-001", "ROUTING-001"}
    assert all("a fault of the device" in f.note for f in report.failures)


def test_what_is_called_after_another_waits_for_it_and_comes_though_it_fails():
    first, order = threading.Event(), []

    def slow():
        first.wait(5)
        order.append("first")
        raise ValueError

    with Ahead.open(2) as ahead:
        ahead.start_after(slow, [lambda: order.append("then")])
        first.set()
        ahead.wait()
    assert order == ["first", "then"]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_find_the_same(workers, source, text_ids):
    """But for the last bits of a product, which may depend on how many rows it has."""
    found = []
    for shared in (ALONE, Workers(workers)):
        runner = ReferenceRunner(source, max_context=512, workers=shared)
        forward = runner.forward(text_ids[:20], capture=FUSED_STAGES)
        judge = StageJudge(source, runner.describe(), text_ids[:20], forward, workers=shared)
        found.append((forward.logits, list(judge.judgements())))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6, atol=1e-5)
    alone, shared = found[0][1], found[1][1]
    assert [j.where for j in alone] == [j.where for j in shared]
    assert [j.nmse for j in alone] == pytest.approx([j.nmse for j in shared], rel=1e-3)


def test_texts_side_by_side_have_the_bits_that_each_has_alone(source, text_ids):
    """In several chunks, with stages; matrices are dequantized once for both."""
    runner = ReferenceRunner(source, max_context=512, workers=Workers(2))
    texts, options = [text_ids[:20], text_ids[30:63]], {"capture": FUSED_STAGES, "chunk_sizes": (16,)}
    rooms = [np.full((len(ids), source.config.vocab_size), np.nan, np.float32) for ids in texts]
    for ids, room, found in zip(texts, rooms, runner.forwards(texts, rooms, **options), strict=True):
        alone = runner.forward(ids, **options)
        assert found.logits is room
        np.testing.assert_array_equal(room, alone.logits)
        np.testing.assert_array_equal(found.expert_ids, alone.expert_ids)
        assert found.stages.keys() == alone.stages.keys()
        for key, value in alone.stages.items():
            np.testing.assert_array_equal(found.stages[key], value, err_msg=str(key))


def test_layers_judged_side_by_side_have_the_verdicts_of_one_after_the_other(source, text_ids):
    forward = ReferenceRunner(source).forward(text_ids[:20], capture=FUSED_STAGES)
    forward.stages["attn_out", 1][3, 5] += 1
    facts = {"compute_dtype": "bfloat16", "cache_dtype": "float16"}
    judge = StageJudge(source, facts, text_ids[:20], forward)
    alone = list(judge.judgements())
    assert next(j.where for j in alone if j.departs) == "attn_out-1"
    assert judge.side_by_side(3) == alone


def test_the_distance_of_logits_is_that_of_all_rows(monkeypatch):
    """Bit for bit, in pieces of any size and by any number of workers; a NaN is not lost in a piece."""
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((9, 300)).astype(np.float32)
    actual = expected + rng.standard_normal((9, 300)).astype(np.float32) * np.float32(1e-3)
    whole = LogitDistance.of(expected, actual)
    monkeypatch.setattr(text_runs, "FLOAT64_BYTES", 2 * 8 * 300)
    pieces = LogitDistance.of(expected, actual, Workers(2))
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(pieces, name), value, err_msg=name)
    actual[8, 7] = np.nan
    broken = LogitDistance.of(expected, actual, Workers(2))
    assert broken.cosine[8] == -1
    assert np.isnan(broken.largest)
    np.testing.assert_array_equal(broken.cosine[:8], whole.cosine[:8])

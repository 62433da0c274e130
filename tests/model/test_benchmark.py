"""Rows of ``qwen3-moe bench``: what is planned, how it is timed, and what becomes of one that cannot be."""

import numpy as np
import pytest

from qwen3_moe_jax.convert.config import PRESETS
from qwen3_moe_jax.jax_backend import runner as jax_runner_module
from qwen3_moe_jax.machine import limits
from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.machine.limits import Limit, Limits, bytes_per_token
from qwen3_moe_jax.measure import benchmark
from qwen3_moe_jax.measure.benchmark import (
    FAILED,
    MEASURED,
    NO_MEMORY,
    NOT_OFFERED,
    TOO_SLOW,
    Benchmark,
    Row,
    Timing,
    Workload,
    plan,
    random_prompts,
    repeated,
)

KNOWN = Limits(Limit(1e9, "a gigabyte per second"), Limit(1e12, "a teraflop per second"))


@pytest.mark.parametrize(
    ("workload", "name", "context"),
    [
        (Workload("pp", 512), "pp512", 513),
        (Workload("tg", 128), "tg128", 130),
        (Workload("tg", 128, 4096), "tg128 @ d4096", 4225),
        (Workload("pp", 512, 0, 8), "8 x pp512", 513),
        (Workload("tg", 64, 512, 32), "32 x tg64 @ d512", 577),
    ],
)
def test_rows_are_named_as_llama_bench_names_them(workload, name, context):
    assert workload.name == name
    assert workload.context == context


def test_the_plan_has_every_row_that_is_asked_for():
    names = [w.name for w in plan([512, 64], 16, [0, 100], [1, 8], 512)]
    assert names == [
        "pp512",
        "pp64",
        "tg16",
        "tg16 @ d100",
        "1 x pp512",
        "1 x tg16 @ d512",
        "8 x pp512",
        "8 x tg16 @ d512",
    ]


def test_the_first_run_is_not_counted_and_time_ends_the_others():
    seconds = iter([(9.0, 90.0), (2.0, 20.0), (1.0, 10.0), (3.0, 30.0)])
    first, second = repeated(lambda: next(seconds), 3)
    assert first == Timing(9.0, (2.0, 1.0, 3.0))
    assert second == Timing(90.0, (20.0, 10.0, 30.0))
    calls = []
    (timing,) = repeated(lambda: (calls.append(1) or 1.0,), 5, max_seconds=0.0)
    assert timing.runs == (1.0,)
    assert len(calls) == 2


def test_rates_are_of_all_sequences():
    row = Row(Workload("tg", 10, 4, 3), timing=Timing(9.0, (3.0, 1.0, 2.0)), limit=60.0)
    assert row.rates == [10.0, 30.0, 15.0]
    assert (row.best, row.median, row.share) == (30.0, 15.0, 0.5)
    assert row.as_dict()["test"] == "3 x tg10 @ d4"
    assert row.as_dict()["tokens_per_s_best"] == 30.0


def test_random_prompts_are_the_same_each_time_and_differ_by_sequence():
    config = PRESETS["Qwen3-30B-A3B"]
    ids = random_prompts(config, 3, 50)
    np.testing.assert_array_equal(ids, random_prompts(config, 3, 50))
    assert len({tuple(row) for row in ids.tolist()}) == 3
    assert 0 <= ids.min() <= ids.max() < config.vocab_size


# Limits


def test_operations_of_a_prompt_by_hand():
    config = PRESETS[
        "Qwen3-30B-A3B"
    ]  # 48 layers, 2048 wide, 32 heads of 128, 4 KV heads, 8 of 128 experts of 768
    a_token = 2048 * (2 * 4096 + 2 * 512 + 128) + 3 * 2048 * 768 * 8
    attention = sum(2 * 4096 * seen for seen in range(1, 11))
    assert limits.prefill_operations(config, 3, 10) == pytest.approx(2 * 48 * 3 * (10 * a_token + attention))


def test_bytes_of_a_step_count_experts_that_a_batch_is_expected_to_choose(source):
    config = source.config
    parts = dict.fromkeys(("experts", "rest", "embedding"), 0.0)
    for path in source.specs:
        name = "experts" if ".experts." in path else "embedding" if path == "embed_tokens" else "rest"
        parts[name] += source.tensor_nbytes(path)
    a_row = parts["embedding"] / config.vocab_size
    one = parts["rest"] + parts["experts"] * 4 / 16 + a_row
    two = parts["rest"] + parts["experts"] * (1 - (12 / 16) ** 2) + 2 * a_row
    assert bytes_per_token(source) == pytest.approx(one, rel=1e-3)
    assert bytes_per_token(source, 2) == pytest.approx(two, rel=1e-3)
    a_position = 2 * 6 * 2 * 64 * 4  # keys and values, layers, KV heads, width, float32
    assert limits.step_nbytes(source, 4, 2, 100) == pytest.approx(two + 2 * 100 * a_position, rel=1e-3)


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "memory", "arithmetic"),
    [
        ("NVIDIA H100 80GB HBM3 (gpu)", "jax", "bfloat16", 3.35e12, 989e12),
        ("NVIDIA H100 PCIe (gpu)", "jax", "bfloat16", 2.0e12, 756e12),
        ("NVIDIA L40 (gpu)", "jax", "bfloat16", 0.864e12, 181e12),
        ("NVIDIA H100 80GB HBM3 (gpu)", "jax", "float32", 3.35e12, None),
        ("NVIDIA H100 (DiscreteGPU) via Vulkan", "wgpu", "float32", 3.35e12, None),
        ("Radeon 7 (gpu)", "jax", "bfloat16", None, None),
    ],
)
def test_limits_of_known_and_unknown_devices(device, backend, dtype, memory, arithmetic):
    found = Limits.of({"device": device, "backend": backend, "compute_dtype": dtype})
    assert (found.memory.rate, found.arithmetic.rate) == (memory, arithmetic)
    assert all(limit.origin for limit in (found.memory, found.arithmetic))


def test_limits_of_a_processor_are_measured_and_said_to_be(monkeypatch):
    monkeypatch.setattr(limits, "READ_NBYTES", 8 << 20)
    monkeypatch.setattr(limits, "PRODUCT_SIZE", 256)
    for facts in (
        {"device": "cpu (cpu)", "backend": "jax", "compute_dtype": "float32"},
        {"device": "llvmpipe", "backend": "wgpu", "compute_dtype": "float32", "software": True},
    ):
        found = Limits.of(facts)
        for limit in (found.memory, found.arithmetic):
            assert limit.rate > 1e8
            assert "measured" in limit.origin


# Rows of a runner


class FakeRunner:
    """Streams what is asked for; fails for prompts of the lengths in ``errors``."""

    name = "fake"

    def __init__(self, errors=None):
        self.errors = errors or {}
        self.asked = []

    def describe(self):
        return {"device": "none", "backend": self.name, "compute_dtype": "float32"}

    def stream(self, token_ids, *, max_tokens, sampling, stop_ids=()):
        self.asked.append((len(token_ids), max_tokens))
        if len(token_ids) in self.errors:
            raise self.errors[len(token_ids)]
        yield from range(max_tokens)


def measure(source, runner, workloads, **options) -> dict[str, Row]:
    groups = Benchmark(source, runner, given_limits=KNOWN, **options).rows(workloads)
    return {row.workload.name: row for group in groups for row in group}


def test_each_row_asks_for_its_own_tokens(source):
    runner = FakeRunner()
    rows = measure(source, runner, plan([12], 5, [0, 7], [], 12), repeats=2)
    assert runner.asked == [(12, 1)] * 3 + [(1, 6)] * 3 + [(7, 6)] * 3
    assert all(row.outcome == MEASURED and len(row.rates) == 2 for row in rows.values())
    assert rows["pp12"].limit == pytest.approx(12 * 1e12 / limits.prefill_operations(source.config, 1, 12))
    assert rows["tg5 @ d7"].limit == pytest.approx(1e9 / limits.step_nbytes(source, 4, 1, 10))


def test_a_row_that_cannot_be_measured_says_why_and_the_others_go_on(source):
    runner = FakeRunner(
        {
            11: RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying\nto allocate"),
            12: MemoryError("no"),
            13: ArithmeticError("not finite"),
        }
    )
    rows = measure(source, runner, plan([11, 12, 13, 14], 5, [], [2], 11))
    outcomes = {name: row.outcome for name, row in rows.items()}
    assert outcomes == {
        "pp11": NO_MEMORY,
        "pp12": NO_MEMORY,
        "pp13": FAILED,
        "pp14": MEASURED,
        "2 x pp11": NOT_OFFERED,
        "2 x tg5 @ d11": NOT_OFFERED,
    }
    assert rows["pp11"].reason == "RESOURCE_EXHAUSTED: Out of memory while trying to allocate"
    assert "one sequence at a time" in rows["2 x pp11"].reason
    assert rows["pp11"].as_dict()["tokens_per_s_best"] is None


def test_a_row_that_would_take_too_long_is_left_out_and_says_so(source, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(
        benchmark.time, "perf_counter", lambda: float(next(clock))
    )  # each look takes a second
    rows = measure(source, FakeRunner(), plan([4], 8, [0, 1000], [], 4), max_seconds=100.0)
    assert rows["pp4"].outcome == rows["tg8"].outcome == MEASURED
    assert rows["tg8 @ d1000"].outcome == TOO_SLOW
    assert "--max-seconds 100" in rows["tg8 @ d1000"].reason


def test_a_runner_that_stops_early_is_a_failure(source):
    class Short(FakeRunner):
        def stream(self, token_ids, *, max_tokens, **options):
            yield from range(max_tokens - 1)

    rows = measure(source, Short(), plan([], 5, [0], [], 1))
    assert rows["tg5"].outcome == FAILED
    assert "4 tokens were written in place of 5" in rows["tg5"].reason


def test_batches_on_jax(source, jax_runner):
    rows = measure(source, jax_runner, plan([], 3, [], [2], 16), repeats=1)
    assert list(rows) == ["2 x pp16", "2 x tg3 @ d16"]
    assert all(row.outcome == MEASURED and row.best > 0 for row in rows.values()), rows


def test_a_batch_beyond_the_memory_says_so(source, jax_runner, monkeypatch):
    monkeypatch.setattr(jax_runner_module, "available_memory", lambda device: Headroom(1 << 20))
    rows = measure(source, jax_runner, plan([], 3, [], [2], 16), repeats=1)
    assert {row.outcome for row in rows.values()} == {NO_MEMORY}
    assert "main memory, 0.00 GB free" in rows["2 x pp16"].reason

"""Every clause of the contract is seen to fail: what it promises is broken, and it says so."""

from dataclasses import replace

import numpy as np
import pytest

from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.unpack import dequantize
from qwen3_moe_jax.core.errors import ParityError
from qwen3_moe_jax.core.runner import Capabilities, Forward
from qwen3_moe_jax.parity import clauses, gate
from qwen3_moe_jax.parity.clauses import BACKEND_CHECKS, FAILED, FILE_CHECKS, PASSED
from qwen3_moe_jax.parity.contract import load_contract
from qwen3_moe_jax.parity.evidence import Evidence, Oracle
from qwen3_moe_jax.parity.gate import check_once
from qwen3_moe_jax.parity.verify import verify
from qwen3_moe_jax.testing import faults
from qwen3_moe_jax.testing.fault_list import FAULTS
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

TOKENS = 96


class Changed:
    """A runner with some attributes or methods of its own."""

    def __init__(self, runner, **changes):
        self._runner = runner
        self.__dict__.update(changes)

    def __getattr__(self, name):
        return getattr(self._runner, name)


@pytest.fixture(scope="module")
def oracle(source, text_ids):
    return Oracle(source, text_ids[:TOKENS])


@pytest.fixture(scope="module")
def plant(source, makers):
    return lambda name: faults.plant(FAULTS[name], source, makers["reference"])


def break_preload(oracle, reference, plant):
    without = {p: t for p, t in oracle.source.types.items() if p != "layers.3.mlp.experts.up_proj"}
    lying = faults.LyingSource(oracle.source, {})
    lying.types = without
    return Evidence(Oracle(lying, oracle.text_ids), reference)


def break_weights(oracle, reference, plant):
    """The device has another scale than the file."""

    def dequantized(path, tile, expert=None):
        weight = oracle.source.tensor(path)
        arrays = {k: a.copy() for k, a in weight.arrays.items()}
        if path == "layers.4.self_attn.k_proj":
            arrays["scales"][0, 0] ^= 1
        weight = PackedTensor(arrays, weight.type)
        return dequantize(weight if expert is None else weight[expert])[16 * tile : 16 * tile + 16]

    return Evidence(
        oracle, Changed(reference, dequantized=dequantized, capabilities=Capabilities(dequantized=True))
    )


def break_invariants(oracle, reference, plant):
    def forward(token_ids, **options):
        found = reference.forward(token_ids, **options)
        found.logits[-1, 7] = np.nan
        return found

    return Evidence(oracle, Changed(reference, forward=forward))


def break_routing(oracle, reference, plant):
    """The chosen expert of the smallest probability gives way to one that was not chosen, at one token."""

    def forward(token_ids, **options):
        found = reference.forward(token_ids, **options)
        if options.get("expert_ids") is None:
            ids = found.expert_ids.copy()
            unchosen = set(range(16)) - set(ids[2, 50].tolist())
            ids[2, 50, -1] = min(unchosen)
            found = Forward(found.logits, ids, found.stages)
        return found

    return Evidence(oracle, Changed(reference, forward=forward))


def break_decode(oracle, reference, plant):
    def stream(token_ids, **options):
        for number, token in enumerate(reference.stream(token_ids, **options)):
            yield token if number != 5 else (token + 1) % 4096

    return Evidence(oracle, Changed(reference, stream=stream))


def break_determinism(oracle, reference, plant):
    noise = iter(range(100))

    def forward(token_ids, **options):
        found = reference.forward(token_ids, **options)
        found.logits[0, 0] += next(noise) * 1e-3
        return found

    return Evidence(oracle, Changed(reference, forward=forward))


def break_memory(oracle, reference, plant):
    """A float32 copy of the experts of a layer or two, say."""
    cache = 40_000_000
    allowed = 1.06 * oracle.source.nbytes + cache + 0.5e9
    return Evidence(oracle, Changed(reference, memory=lambda: {"peak": int(allowed) + 1, "cache": cache}))


def break_speed(oracle, reference, plant):
    return Evidence(oracle, on_gpu(reference))


def on_gpu(runner, **facts):
    """The runner under the name of jax on a GPU."""
    facts = {**runner.describe(), "device": "NVIDIA H100 80GB HBM3 (gpu)", **facts}
    return Changed(runner, name="jax", describe=lambda: facts)


def batched(reference, wrong_at=None, **facts):
    """A runner that takes batches; one of size ``wrong_at`` changes one bit of one logit."""

    def forward(token_ids, *, beside=(), **options):
        found = reference.forward(token_ids, **options)
        assert not beside or options["chunk_sizes"] == (1,)
        assert len({tuple(row) for row in (token_ids, *beside)}) == len(beside) + 1
        if len(beside) + 1 == wrong_at:
            found.logits[5, 77] = np.nextafter(found.logits[5, 77], np.float32(np.inf))
        return found

    facts = {**reference.describe(), "batch_invariant": True, **facts}
    return Changed(reference, forward=forward, capabilities=Capabilities(beside=True), describe=lambda: facts)


FALSIFIED_BY = {
    "PRELOAD-001": break_preload,
    "QUANT-001": break_weights,
    "INVARIANTS-001": break_invariants,
    "STAGES-001": lambda oracle, reference, plant: Evidence(oracle, plant("late-softmax")),
    "PARITY-001": lambda oracle, reference, plant: Evidence(oracle, plant("q-norm")),
    "PARITY-002": None,
    "TEXT-001": lambda oracle, reference, plant: Evidence(oracle, plant("no-renormalization")),
    "ROUTING-001": break_routing,
    "DECODE-001": break_decode,
    "DETERMINISM-001": break_determinism,
    "LOADGATE-001": lambda oracle, reference, plant: Evidence(oracle, plant("gqa-map")),
    "VRAM-001": break_memory,
    "SPEED-001": break_speed,
}
"""How each clause is broken; PARITY-002 speaks of the reference itself."""


@pytest.mark.parametrize("id", FALSIFIED_BY)
def test_clause_can_fail(id, oracle, reference, plant, source, monkeypatch):
    monkeypatch.setattr(clauses, "MIN_TEXT_TOKENS", TOKENS)
    monkeypatch.setattr(clauses, "MIN_SPEED_BYTES", 0)
    monkeypatch.setattr(clauses, "bytes_per_token", lambda source: 1e6)
    clause = load_contract().clauses[id]
    if id == "PARITY-002":
        wrong = Oracle(source, oracle.text_ids)
        wrong.runner = plant("rope-theta")
        finding, good = FILE_CHECKS[id](clause, wrong), FILE_CHECKS[id](clause, oracle)
    else:
        finding = BACKEND_CHECKS[id](clause, FALSIFIED_BY[id](oracle, reference, plant))
        good = BACKEND_CHECKS[id](clause, Evidence(oracle, reference))
    assert finding.verdict == FAILED, finding
    assert finding.note
    assert good.verdict != FAILED, good


@pytest.mark.parametrize("size", clauses.BATCHES)
def test_determinism_001_sees_one_bit_in_a_batch(size, oracle, reference):
    clause, check = load_contract().clauses["DETERMINISM-001"], BACKEND_CHECKS["DETERMINISM-001"]
    sound = check(clause, Evidence(oracle, batched(reference)))
    assert sound.verdict == PASSED
    assert sound.figures["batches"] == {2: 0, 8: 0, 16: 0}
    found = check(clause, Evidence(oracle, batched(reference, size)))
    assert (found.verdict, found.figure) == (FAILED, 1)
    assert f"a batch of {size} changes 1 of 8 positions" in found.note
    assert 0 < found.figures["largest_difference"] < 1e-5
    unpromised = check(clause, Evidence(oracle, batched(reference, size, batch_invariant=False)))
    assert unpromised.verdict == PASSED
    assert "batches are not promised the same bits" in unpromised.note


def test_determinism_001_sees_other_experts_in_a_batch(oracle, reference):
    runner = batched(reference)
    true = runner.forward

    def forward(token_ids, *, beside=(), **options):
        found = true(token_ids, beside=beside, **options)
        if len(beside) == 15:
            found.expert_ids[2, 3] = found.expert_ids[2, 3, ::-1]
        return found

    runner.forward = forward
    clause = load_contract().clauses["DETERMINISM-001"]
    assert BACKEND_CHECKS["DETERMINISM-001"](clause, Evidence(oracle, runner)).verdict == FAILED


def test_parity_001_judges_a_decode_step_of_its_own(oracle, reference):
    """What decoding computes is seen also where no stage of it can be captured."""
    runner = batched(reference)
    true = runner.forward

    def forward(token_ids, **options):
        found = true(token_ids, **options)
        if options.get("chunk_sizes") == (1,):
            found.logits[7] = found.logits[6]
        return found

    clause, check = load_contract().clauses["PARITY-001"], BACKEND_CHECKS["PARITY-001"]
    sound = check(clause, Evidence(oracle, runner))
    assert sound.verdict == PASSED
    assert "24 tokens decoded one by one" in sound.note
    runner.forward = forward
    assert check(clause, Evidence(oracle, runner)).verdict == FAILED


def test_speed_001_states_the_share_where_nothing_is_promised(oracle, reference, monkeypatch):
    clause, check = load_contract().clauses["SPEED-001"], BACKEND_CHECKS["SPEED-001"]
    small = check(clause, Evidence(oracle, Changed(reference, name="jax")))
    assert small.verdict == clauses.NOT_APPLICABLE
    assert "launches are the limit" in small.note
    assert 0 < small.figures["share"] < 1
    assert check(clause, Evidence(oracle, reference)).verdict == clauses.NOT_APPLICABLE
    monkeypatch.setattr(clauses, "bytes_per_token", lambda source: 1e9)
    without_kernels = on_gpu(reference, fallbacks=["XLA in place of the GPU kernels: an old card"])
    found = check(clause, Evidence(oracle, without_kernels))
    assert found.verdict == clauses.NOT_APPLICABLE
    assert "an old card" in found.note
    assert found.figures["share"] > 0
    unknown = check(clause, Evidence(oracle, on_gpu(reference, device="NVIDIA Unheard (gpu)")))
    assert unknown.verdict == clauses.NOT_APPLICABLE


@pytest.mark.parametrize(("rate", "verdict"), [(1.0, FAILED), (1e9, PASSED)])
@pytest.mark.parametrize("device", ["cpu (cpu)", "NVIDIA H100 80GB HBM3 (gpu)"])
def test_speed_001_has_a_bound_for_each_class_of_devices(
    device, rate, verdict, oracle, reference, monkeypatch
):
    monkeypatch.setattr(clauses, "bytes_per_token", lambda source: 1.92e9)
    monkeypatch.setattr(clauses, "_decode_rate", lambda evidence, tokens: rate)
    monkeypatch.setattr(clauses, "read_bandwidth", lambda kernels: 2e10)
    clause = load_contract().clauses["SPEED-001"]
    found = BACKEND_CHECKS["SPEED-001"](clause, Evidence(oracle, on_gpu(reference, device=device)))
    assert (found.verdict, found.bound) == (verdict, 0.12 if "cpu" in device else 0.30)


def test_vram_001_holds_the_process_to_the_bound_for_a_large_model(oracle, reference, monkeypatch):
    clause, check = load_contract().clauses["VRAM-001"], BACKEND_CHECKS["VRAM-001"]
    large = Oracle(oracle.source, oracle.text_ids)
    large.is_small = False

    class Grown:
        def growth(self):
            return int(2e9)

    assert check(clause, Evidence(large, reference, Grown())).verdict == FAILED
    monkeypatch.setattr(Grown, "growth", lambda self: int(0.4e9))
    assert check(clause, Evidence(large, reference, Grown())).verdict == PASSED
    assert "before verify could measure" in check(clause, Evidence(large, reference)).note
    assert "small file" in check(clause, Evidence(oracle, reference, Grown())).note


def test_quant_001_sees_a_wrong_reading_of_the_file(source, oracle):
    def change(packed):
        arrays = {k: a.copy() for k, a in packed.arrays.items()}
        arrays["mins"][0, 3] ^= 4
        return PackedTensor(arrays, packed.type)

    lying = faults.LyingSource(source, {"layers.1.self_attn.q_proj": change})
    clause = load_contract().clauses["QUANT-001"]
    assert FILE_CHECKS["QUANT-001"](clause, oracle).verdict == PASSED
    finding = FILE_CHECKS["QUANT-001"](clause, Oracle(lying, oracle.text_ids))
    assert finding.figure == 32  # one subblock


def test_loadgate_001_keeps_a_wrong_backend_out(source, plant, reference, tmp_path):
    with pytest.raises(ParityError, match="kqv_out-0"):
        check_once(plant("gqa-map"), source, tmp_path)
    assert not list(tmp_path.iterdir())
    assert check_once(reference, source, tmp_path) is not None
    assert check_once(reference, source, tmp_path) is None  # remembered


@pytest.mark.parametrize("backend", ["reference", "jax"])
def test_the_gate_takes_few_layers_of_a_deep_model(backend, source, makers, monkeypatch):
    assert gate.gate_layers(source) == (0, 1, 2, 3, 4, 5)
    monkeypatch.setattr(gate, "FEW_LAYERS", 3)
    assert gate.gate_layers(source) == (0, 2, 5)  # another mix of types from layer 2 on, and the last
    found = gate.inspect(makers[backend](source), source)
    assert (found.layers, found.stages, found.departures) == ((0, 2, 5), 3 + 3 * 18, ())
    wrong = gate.inspect(faults.plant(FAULTS["gqa-map"], source, makers[backend]), source)
    assert wrong.departures[0].where == "kqv_out-0"


def test_routing_001_fails_when_the_error_is_beyond_the_margin(oracle, reference):
    clause = load_contract().clauses["ROUTING-001"]
    found = Evidence(oracle, reference)
    found.router_errors = np.full(oracle.text.expert_ids.shape[:2], 100.0)
    assert BACKEND_CHECKS["ROUTING-001"](clause, found).verdict == FAILED


def test_routing_001_takes_equals_without_an_error_by_their_order(oracle, reference, monkeypatch):
    """As in a model of zeros: no margin, and no error that could change the choice."""
    monkeypatch.setattr(clauses.metrics, "router_margin", lambda logits, chosen: np.zeros(logits.shape[:-1]))
    found = Evidence(oracle, reference)
    found.router_errors = np.zeros(oracle.text.expert_ids.shape[:2])
    assert BACKEND_CHECKS["ROUTING-001"](load_contract().clauses["ROUTING-001"], found).verdict == PASSED


def test_a_flip_explains_later_ones_only():
    flipped = np.zeros((3, 4), bool)
    flipped[1, 2] = True
    after = clauses._after_a_flip(flipped)
    assert after.tolist() == [[False] * 4, [False] * 4, [False, False, True, True]]


@pytest.mark.parametrize("experts", [3, 8, 24])
def test_quant_001_of_matrices_of_few_rows(tmp_path, experts):
    """A router of fewer rows than a tile has, and one whose last tile is not whole."""
    from qwen3_moe_jax.jax_backend.runner import JaxRunner

    write_random_gguf(tmp_path / "few.gguf", replace(SMALL, num_experts=experts), mix="all", seed=1)
    with open_model(tmp_path / "few.gguf") as source:
        report = verify(source, [JaxRunner(source, max_context=64)], text_tokens=64, clauses=["QUANT-001"])
    assert [f.verdict for f in report.findings] == ["passed", "passed"]


@pytest.mark.parametrize(
    "error",
    [TypeError("no"), KeyError("x"), AttributeError("y"), MemoryError(), AssertionError(), IndexError()],
)
def test_any_exception_of_a_backend_is_that_clauses_failure(source, reference, error):
    def broken(*args, **options):
        raise error

    runner = Changed(reference, forward=broken)
    report = verify(source, [runner], text_tokens=64, clauses=["STAGES-001", "LOADGATE-001", "PRELOAD-001"])
    verdicts = {f.clause: f.verdict for f in report.findings}
    assert verdicts == {"PRELOAD-001": "passed", "LOADGATE-001": "failed", "STAGES-001": "failed"}
    assert not report.passed


@pytest.mark.parametrize("tokens", [0, -1, 63])
def test_a_text_below_what_clauses_need_is_refused(source, reference, tokens):
    with pytest.raises(ValueError, match="give at least 64"):
        verify(source, [reference], text_tokens=tokens)

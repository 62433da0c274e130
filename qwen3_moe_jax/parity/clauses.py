"""The checks: one function a clause, from evidence to a finding."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.machine.datasheets import peak_bandwidth
from qwen3_moe_jax.machine.limits import bytes_per_token, is_cpu, read_bandwidth
from qwen3_moe_jax.parity import metrics
from qwen3_moe_jax.parity.contract import CPU, NVIDIA, Clause
from qwen3_moe_jax.parity.evidence import BATCH_TOKENS, BATCHES, STAGE_CHUNK, STAGE_TOKENS, Evidence, Oracle
from qwen3_moe_jax.parity.judge import FUSED_STAGES
from qwen3_moe_jax.parity.text_runs import LogitDistance, broken_invariants

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"

MIN_TEXT_TOKENS = 2000
CAUSAL_TOLERANCE = 1e-3
"""Logits of a position may differ this much with what comes after it (another order of sums)."""

MIN_DECIDED = 0.5
"""Share of expert choices whose margin has to exceed the error, or agreement means nothing."""

FILE_SHARE, FREE_BYTES = 1.06, 0.5e9
"""Device memory may be this much of the file, and this many bytes, beside the KV cache."""

SPEED_TOKENS = {NVIDIA: 256, CPU: 32}
MIN_SPEED_BYTES = 200e6
"""Bytes per token below which decoding is bound by launches, not by bandwidth."""


@dataclass(frozen=True)
class Finding:
    """What a clause came to for one subject.

    Attributes:
      clause: its id.
      subject: "jax bfloat16", or "file" and "reference" for what no backend has a part in.
      verdict: PASSED, FAILED or NOT_APPLICABLE.
      figure, bound: what was measured and what was promised; None where not applicable.
      note: one line for people.
      figures: further figures for the receipt.
      seconds: that were waited for it; what others had made already takes none.
    """

    clause: str
    subject: str
    verdict: str
    figure: float | None
    bound: float | None
    note: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def conclude(
    clause: Clause, subject: str, figure: float, note: str, kind: str = "float32", **figures: Any
) -> Finding:
    """Holds a figure against the clause's bound for a compute dtype or a class of devices."""
    verdict = PASSED if clause.holds(figure, kind) else FAILED
    return Finding(clause.id, subject, verdict, float(figure), clause.bound(kind), note, figures)


def not_applicable(clause: Clause, subject: str, reason: str, **figures: Any) -> Finding:
    return Finding(clause.id, subject, NOT_APPLICABLE, None, None, reason, figures)


# The file


def check_preload(clause: Clause, evidence: Evidence) -> Finding:
    """PRELOAD-001: the runner is loaded; counts layers without their expert stacks."""
    source = evidence.source
    stacks = ("gate_proj", "up_proj", "down_proj")
    incomplete = [
        layer
        for layer in range(source.config.num_hidden_layers)
        if any(f"layers.{layer}.mlp.experts.{name}" not in source.types for name in stacks)
    ]
    dense = sum(".mlp." in path and ".mlp.experts." not in path for path in source.types)
    dense -= source.config.num_hidden_layers  # the routers
    note = f"{source.config.num_hidden_layers} sparse layers, {dense} dense FFN tensors"
    return conclude(clause, evidence.label, len(incomplete) + max(dense, 0), note)


def check_file_weights(clause: Clause, oracle: Oracle) -> Finding:
    """QUANT-001 for the file: two readings of the same blocks."""
    source = oracle.source
    if source.path.is_dir():
        return not_applicable(
            clause, "file", "a packed checkpoint has no blocks; its SHA-256 is checked when it is read"
        )
    different, count = oracle.file_rows
    note = f"{count:,} weights of {len(source.specs)} tensors read twice"
    return conclude(clause, "file", different, note, weights=count)


def check_device_weights(clause: Clause, evidence: Evidence) -> Finding:
    """QUANT-001 for a backend: what its device unpacks against what the file holds."""
    found = evidence.device_weights
    if found is None:
        reason = "its weights cannot be read back; every row of them is judged in STAGES-001"
        return not_applicable(clause, evidence.label, reason)
    different, count = found
    return conclude(clause, evidence.label, different, f"{count:,} weights read back from the device")


def check_recorded(clause: Clause, oracle: Oracle) -> Finding:
    """PARITY-002: the reference against logits that another program computed."""
    if not oracle.recorded:
        return not_applicable(clause, "reference", "no recorded logits for this file")
    minimum = 1.0
    for prompt in oracle.recorded:
        logits = oracle.runner.forward(prompt.token_ids).logits[prompt.positions]
        minimum = min(minimum, float(metrics.cosine(prompt.logits, logits).min()))
    positions = sum(len(p.positions) for p in oracle.recorded)
    return conclude(clause, "reference", minimum, f"{positions} positions of {len(oracle.recorded)} prompts")


# A backend


def check_invariants(clause: Clause, evidence: Evidence) -> Finding:
    """INVARIANTS-001: shapes, finite numbers, experts; and a prompt's rows do not depend on what follows."""
    broken: list[str] = []
    ids = evidence.oracle.text_ids
    longest = min(3 * STAGE_CHUNK, len(ids))
    lengths = [longest - STAGE_CHUNK + 1, longest - 1, longest]
    # With the stages of another check captured, so that one compiled program serves both.
    runs = [evidence.runner.forward(ids[:n], capture=FUSED_STAGES, **evidence.chunks) for n in lengths]
    for length, forward in zip(lengths, runs, strict=True):
        found = broken_invariants(evidence.source.config, forward, length)
        broken += [f"{what} at length {length}" for what in found]
    broken += [f"{what} at length {len(ids)}" for what in evidence.free.broken]
    whole = runs[-1].logits
    for length, forward in zip(lengths[:-1], runs[:-1], strict=True):
        if forward.logits.shape == whole[:length].shape:
            gap = np.abs(forward.logits - whole[:length]).max(initial=0)
            scale = np.abs(whole).max()
            if not gap <= CAUSAL_TOLERANCE * max(1.0, scale) and evidence.compute_dtype == "float32":
                broken.append(f"logits of {length} tokens change with what follows them")
    note = broken[0] if broken else f"lengths {', '.join(map(str, [*lengths, len(ids)]))}"
    return conclude(clause, evidence.label, len(broken), note, broken=broken)


def check_stages(clause: Clause, evidence: Evidence) -> Finding:
    """STAGES-001: every stage from its own inputs."""
    judged = evidence.judgements
    run, worst = max(judged, key=lambda pair: (pair[1].departs, pair[1].sigmas))
    departing = [(r, j) for r, j in judged if j.departs]
    figure = worst.sigmas if not departing else max(worst.sigmas, np.nextafter(clause.bound(), np.inf))
    note = f"{len(judged)} stages; the furthest is {worst.where} ({run}), NMSE {worst.nmse:.1e}"
    if departing:
        run, first = departing[0]
        tensor = f", {first.tensor} ({first.type})" if first.tensor else ""
        note = f"{len(departing)} of {len(judged)} stages depart, first {first.where}{tensor} ({run})"
    worst_by_stage: dict[str, float] = {}
    for _, j in judged:
        worst_by_stage[j.stage] = max(worst_by_stage.get(j.stage, 0.0), j.sigmas)
    return conclude(clause, evidence.label, figure, note, evidence.compute_dtype, sigmas=worst_by_stage)


def check_logits(clause: Clause, evidence: Evidence) -> Finding:
    """PARITY-001: replayed decides, free-running is stated beside it."""
    replayed, free, decoded = evidence.replayed.distance, evidence.free.distance, evidence.decoded
    missing = len(evidence.oracle.text_ids) - len(evidence.replayed.checksums)
    decides = [replayed] if decoded is None else [replayed, decoded]
    figure = metrics.WORST_COSINE if missing else min(float(d.cosine.min()) for d in decides)
    note = (
        f"{len(replayed.cosine)} positions; minimum cosine {_nines(replayed.cosine.min())} replayed, "
        f"{_nines(free.cosine.min())} free-running"
    )
    if decoded is not None:
        note += f"; {_nines(decoded.cosine.min())} of {len(decoded.cosine)} tokens decoded one by one"
    if missing:
        note = f"{missing} of {len(evidence.oracle.text_ids)} positions are missing"
    return conclude(
        clause,
        evidence.label,
        figure,
        note,
        evidence.compute_dtype,
        replayed=replayed.figures(),
        free_running=free.figures(),
        **({} if decoded is None else {"decoded": decoded.figures()}),
    )


def _nines(cosine: float) -> str:
    return f"1 - {1 - cosine:.1e}" if cosine > 0.9 else f"{cosine:.4f}"


def check_text(clause: Clause, evidence: Evidence) -> Finding:
    """TEXT-001: KL divergence and top-1 agreement, free-running."""
    free, tokens = evidence.free.distance, len(evidence.oracle.text_ids)
    if tokens < MIN_TEXT_TOKENS:
        return not_applicable(
            clause,
            evidence.label,
            f"only {tokens} tokens of text fit; the clause asks for {MIN_TEXT_TOKENS}",
        )
    missing = tokens - len(evidence.free.checksums)
    figure = np.inf if missing else float(free.kl.mean())
    note = f"{tokens} tokens; mean KL {free.kl.mean():.1e} nats, same best token {free.top1:.2%}"
    return conclude(
        clause,
        evidence.label,
        figure,
        note,
        evidence.compute_dtype,
        replayed_kl_mean=float(evidence.replayed.distance.kl.mean()),
        replayed_top1_agreement=evidence.replayed.distance.top1,
        free_running_kl_mean=float(free.kl.mean()),
        free_running_top1_agreement=free.top1,
    )


def check_routing(clause: Clause, evidence: Evidence) -> Finding:
    """ROUTING-001: a choice may differ only where the margin is within the error, or after one that did."""
    oracle = evidence.oracle
    if evidence.free.expert_ids.shape != oracle.text.expert_ids.shape:
        return conclude(clause, evidence.label, np.inf, "expert choices of some positions are missing")
    overlap = metrics.expert_overlap(oracle.text.expert_ids, evidence.free.expert_ids)  # [L, T]
    margin = metrics.router_margin(oracle.router_logits, oracle.source.config.num_experts_per_tok)
    # without an error equals too are decided: by their order
    decided = (margin > 2 * evidence.router_errors) | (evidence.router_errors == 0)
    flipped = overlap < 1
    explained = flipped & (~decided | _after_a_flip(flipped))
    unexplained = int((flipped & ~explained).sum())
    share = float(decided.mean())
    note = (
        f"{int(flipped.sum())} of {flipped.size} choices differ, {unexplained} unexplained; "
        f"the margin exceeds the error in {share:.2%}"
    )
    figure = unexplained if share >= MIN_DECIDED else np.inf
    if share < MIN_DECIDED:
        note = f"the router's error exceeds its margin in {1 - share:.0%} of choices"
    return conclude(
        clause,
        evidence.label,
        figure,
        note,
        evidence.compute_dtype,
        choices=int(flipped.size),
        differing=int(flipped.sum()),
        unexplained=unexplained,
        expert_overlap=float(overlap.mean()),
        decided_share=share,
        router_error_max=float(evidence.router_errors.max()),
        router_margin_median=float(np.median(margin)),
    )


def _after_a_flip(flipped: np.ndarray) -> np.ndarray:
    """Which choices [L, T] can follow from a flip in a layer before, at this or an earlier token."""
    so_far = np.logical_or.accumulate(np.logical_or.accumulate(flipped, axis=0), axis=1)
    before = np.zeros_like(flipped)
    before[1:] = so_far[:-1]
    return before


def check_decode(clause: Clause, evidence: Evidence) -> Finding:
    """DECODE-001: every written token is the reference's best one, within twice the error of the logits."""
    written = evidence.written
    if not written:
        return conclude(clause, evidence.label, np.inf, "nothing was written")
    logits = evidence.expected
    gap = logits.max(axis=-1) - logits[np.arange(len(written)), written]
    allowed = 2 * max(evidence.free.distance.largest, 1e-6)
    wrong = np.flatnonzero(~(gap <= allowed))
    same = float((logits.argmax(axis=-1) == written).mean())
    note = f"{len(written)} tokens, {same:.0%} the reference's best"
    if wrong.size:
        note = f"token {wrong[0]} of {len(written)} is {gap[wrong[0]]:.2g} below the best logit"
    return conclude(
        clause, evidence.label, len(wrong), note, allowed_gap=allowed, largest_gap=float(gap.max())
    )


def check_determinism(clause: Clause, evidence: Evidence) -> Finding:
    """DETERMINISM-001: logits and written tokens twice; batches, where they are promised the same bits."""
    first, second = evidence.free.checksums, evidence.again
    different = int((first != second).sum()) if first.shape == second.shape else first.size
    written = evidence.write()
    different += sum(a != b for a, b in zip(evidence.written, written, strict=False))
    different += abs(len(written) - len(evidence.written))
    note = f"{first.size:,} positions and {len(written)} written tokens, twice"
    if not evidence.facts.get("batch_invariant"):
        note += "; batches are not promised the same bits"
        return conclude(clause, evidence.label, different, note, batches="not promised")
    if not evidence.is_batch_invariant:
        return conclude(clause, evidence.label, different, f"{note}; it runs one sequence at a time")
    batches, largest = _differences_in_batches(evidence)
    sizes = ", ".join(map(str, batches))
    note += f"; {BATCH_TOKENS} tokens alone and in batches of {sizes}"
    wrong = [size for size, count in batches.items() if count]
    if wrong:
        changed = f"{batches[wrong[0]]} of {BATCH_TOKENS} positions by up to {largest:.1e}"
        note = f"a batch of {wrong[0]} changes {changed}"
    different += sum(batches.values())
    return conclude(clause, evidence.label, different, note, batches=batches, largest_difference=largest)


def _differences_in_batches(evidence: Evidence) -> tuple[dict[int, int], float]:
    """Positions that differ in any bit of logits or experts, by size of the batch; the largest difference."""
    alone = evidence.in_batches[1]()
    found, largest = {}, 0.0
    for size in BATCHES:
        among = evidence.in_batches[size]()
        if among.logits.shape != alone.logits.shape:
            found[size] = len(alone.logits)
            continue
        bits = (among.logits.view(np.uint32) != alone.logits.view(np.uint32)).any(axis=-1)
        bits |= (among.expert_ids != alone.expert_ids).any(axis=(0, 2))
        found[size] = int(bits.sum())
        largest = max(largest, LogitDistance.of(alone.logits, among.logits).largest)
    return found, largest


def check_gate(clause: Clause, evidence: Evidence) -> Finding:
    """LOADGATE-001: what the gate finds, whatever it remembers."""
    gate = evidence.gate
    note = f"layers {', '.join(map(str, gate.layers))}: {gate.stages} stages in {gate.seconds:.1f} s"
    if gate.departures:
        note += f"; {gate.departures[0].where} departs"
    return conclude(clause, evidence.label, len(gate.departures), note, seconds=gate.seconds)


def check_memory(clause: Clause, evidence: Evidence) -> Finding:
    """VRAM-001."""
    if evidence.runner.name not in clause.backends:
        return not_applicable(clause, evidence.label, "WebGPU does not say how much memory is taken")
    memory = evidence.memory
    if memory is None:
        return not_applicable(clause, evidence.label, _why_no_memory(evidence))
    allowed = FILE_SHARE * evidence.source.nbytes + memory["cache"] + FREE_BYTES
    note = f"peak {memory['peak'] / 1e9:.2f} GB of {allowed / 1e9:.2f} GB allowed"
    return conclude(clause, evidence.label, memory["peak"] / allowed, note, allowed=allowed, **memory)


def _why_no_memory(evidence: Evidence) -> str:
    device = evidence.facts["device"]
    if evidence.oracle.is_small:
        return f"{device} reports no device memory, and Python and XLA take more than this small file"
    return f"{device} reports no device memory, and the model was loaded before verify could measure"


def check_speed(clause: Clause, evidence: Evidence) -> Finding:
    """SPEED-001; the share is stated also where nothing is promised."""
    device = str(evidence.facts["device"])
    if evidence.runner.name not in clause.backends:
        return not_applicable(
            clause, evidence.label, f"nothing is promised of the {evidence.runner.name} backend"
        )
    kind = CPU if is_cpu(evidence.facts) else NVIDIA
    peak = (
        read_bandwidth(str(evidence.facts.get("kernels", "xla"))) if kind == CPU else peak_bandwidth(device)
    )
    if peak is None:
        return not_applicable(clause, evidence.label, f"no bandwidth figure is known for {device}")
    needed = bytes_per_token(evidence.source)
    rate = _decode_rate(evidence, SPEED_TOKENS[kind])
    share = rate * needed / peak
    note = f"{rate:.1f} tokens/s of {peak / needed:.0f} that {peak / 1e9:.0f} GB/s allow"
    figures = {"tokens_per_s": rate, "bytes_per_token": needed, "bytes_per_s": peak, "share": share}
    if needed <= MIN_SPEED_BYTES:
        reason = f"{needed / 1e6:.0f} MB per token: launches are the limit, not bandwidth ({note})"
        return not_applicable(clause, evidence.label, reason, **figures)
    fallbacks = evidence.facts["fallbacks"]
    if kind == NVIDIA and isinstance(fallbacks, list) and fallbacks:
        return not_applicable(clause, evidence.label, f"{fallbacks[0]} ({note})", **figures)
    return conclude(clause, evidence.label, share, note, kind, **figures)


def _decode_rate(evidence: Evidence, tokens: int) -> float:
    """Tokens a second after the first, of a greedy text."""
    prompt = evidence.oracle.text_ids[:STAGE_TOKENS].tolist()
    limit = min(tokens, evidence.runner.max_context - len(prompt))
    stream = evidence.runner.stream(prompt, max_tokens=limit, sampling=Sampling(temperature=0))
    times = [time.perf_counter() for _ in stream]
    return (len(times) - 1) / (times[-1] - times[0])


FILE_CHECKS: dict[str, Callable[[Clause, Oracle], Finding]] = {
    "QUANT-001": check_file_weights,
    "PARITY-002": check_recorded,
}
"""Clauses of the file and the reference, checked once."""

BACKEND_CHECKS: dict[str, Callable[[Clause, Evidence], Finding]] = {
    "PRELOAD-001": check_preload,
    "VRAM-001": check_memory,
    "LOADGATE-001": check_gate,
    "QUANT-001": check_device_weights,
    "STAGES-001": check_stages,
    "INVARIANTS-001": check_invariants,
    "PARITY-001": check_logits,
    "TEXT-001": check_text,
    "ROUTING-001": check_routing,
    "DECODE-001": check_decode,
    "DETERMINISM-001": check_determinism,
    "SPEED-001": check_speed,
}
"""Clauses checked for every backend: memory before anything else runs, then the cheap and telling ones."""

TEXT_CLAUSES = frozenset(
    {"INVARIANTS-001", "PARITY-001", "TEXT-001", "ROUTING-001", "DECODE-001", "DETERMINISM-001"}
)
"""Clauses that run the whole text, whose logits take memory."""

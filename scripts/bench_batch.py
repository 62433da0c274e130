"""Speed of many sequences at once, through the batch that a server's scheduler fills.

    python -m scripts.bench_batch --sequences 16 32 64        # random weights of full size, on a GPU
    python -m scripts.bench_batch -m embedded --sequences 4 --prompt 64   # or a file
    python -m scripts.bench_batch --preset small --sequences 4 --prompt 32
    python -m scripts.bench_batch --work decode --random-cache   # one program for each number of sequences
    python -m scripts.bench_batch --preset Qwen3-235B-A22B --mesh tp=2,ep=1 --kernels hopper --sequences 1 64

For each number of sequences, what --work names:
  prefill   prompts together, until each has its first token
  decode    then tokens for all of them, --steps per dispatch, at the prompts' depth; with --random-cache
            the prompts are not read, their keys and values are random numbers
  mixed     a quarter of the sequences is replaced by new prompts while the others go on: prompt tokens and
            written tokens of the same seconds
  skewed    those of prefill and decode that --work names again, with routing that follows Zipf's law, most
            tokens to few experts: random weights route evenly, real ones do not

Every token is sampled (temperature 1, top_k 20, one seed each): greedy sequences of random weights fall into
loops and share their experts. The best of --repeats counts; the first run compiles and does not. Limits:
for prompts --tflops; for decoding the bytes of the weights that a step reads, experts in the number that
even routing is expected to choose, and the cache's, over --bandwidth; on a mesh, of all its devices. The
last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.config import PRESETS, Qwen3MoeConfig
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.tensor_names import q4_k_m_types
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.batching import Batch
from qwen3_moe_jax.jax_backend.decode_path import Decoder, choose
from qwen3_moe_jax.jax_backend.generate import MAX_STEPS, PREFILL_CHUNKS, empty_state
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.params import GPU_ROLES
from qwen3_moe_jax.jax_backend.qwen3_moe import Intervention, Qwen3Moe
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.session_programs import cache_length
from qwen3_moe_jax.jax_backend.sharding import MeshShape, Shards
from qwen3_moe_jax.loader import KV_CACHES, embedded_model
from qwen3_moe_jax.machine.jax_devices import jax_devices, simulate_devices
from qwen3_moe_jax.machine.kernels import AUTO, CHOICES, capability_of, choose_kernels
from qwen3_moe_jax.machine.limits import prefill_operations
from qwen3_moe_jax.machine.memory import cache_nbytes
from scripts._random_params import random_params, sharded_random_params

SEED = 11
WORK = ("prefill", "decode", "mixed", "skewed")
ZIPF_EXPONENT = 1.0
SMALL = {"num_hidden_layers": 2, "num_experts": 16, "num_experts_per_tok": 4, "vocab_size": 4096}
"""What ``--preset small`` changes of the smallest preset, for machines without a GPU."""


@dataclass(frozen=True)
class Subject:
    """The model that is timed."""

    decoder: Decoder
    params: Any
    cache_dtype: Any

    @property
    def config(self) -> Qwen3MoeConfig:
        return self.decoder.model.config

    def batch(self, slots: int, capacity: int) -> Batch:
        dtype = self.cache_dtype.name
        return Batch(
            self.decoder,
            self.params,
            empty_state(self.config, slots, cache_length(capacity), capacity, dtype, self.decoder.shards),
        )


def of_preset(args: argparse.Namespace) -> Subject:
    """Random weights in the types of a Q4_K_M file, made on the devices."""
    config = PRESETS["Qwen3-30B-A3B" if args.preset == "small" else args.preset]
    if args.preset == "small":
        config = replace(config, **SMALL)
    if args.layers:
        config = replace(config, num_hidden_layers=args.layers)
    types, device = q4_k_m_types(config), jax_devices()[0]
    shards = None
    if args.mesh:
        shape = MeshShape.parse(args.mesh)
        shape.check(config, types)
        shards = Shards.of(shape, config, jax_devices())
    kernels = choose_kernels(args.kernels, capability_of(device), jax.__version_info__)
    params = sharded_random_params(shards, types) if shards else random_params(config, types, GPU_ROLES)
    dtype = jnp.dtype(args.kv_cache or "float16")
    model = Qwen3Moe(config, jnp.bfloat16, kernels=kernels.name, shards=shards)
    return Subject(choose(model, jax.block_until_ready(params), device, dtype), params, dtype)


def of_file(args: argparse.Namespace) -> Subject:
    with open_model(embedded_model() if args.model == "embedded" else args.model) as source:
        mesh = MeshShape.parse(args.mesh) if args.mesh else None
        runner = JaxRunner(source, max_context=64, cache_dtype=args.kv_cache, kernels=args.kernels, mesh=mesh)
    return Subject(runner.decoder, runner.params, runner.cache_dtype)


def skewed(subject: Subject) -> Subject:
    """The same model with a bias on the router's logits, so that use of experts follows Zipf's law.

    Such a bias is no part of the network: the GPU's fused decode step does not know it and is off.
    """
    experts = subject.config.num_experts
    bias = -ZIPF_EXPONENT * np.log(np.arange(1, experts + 1))
    change = Intervention("ffn_moe_logits", lambda logits: logits + jnp.asarray(bias, jnp.float32))
    return replace(subject, decoder=subject.decoder.clone(interventions=(change,)))


def routing(subject: Subject, tokens: int) -> dict[str, float]:
    """How uneven the use of experts is for ``tokens`` random tokens, as the mean of all layers."""
    ids = jnp.asarray(prompts(subject.config, 1, tokens, 0))
    cache = KVCache.create(subject.config, 1, tokens, subject.cache_dtype)
    spans = [Span(jnp.zeros(1, jnp.int32), tokens)]
    run = jax.jit(lambda params, *args: subject.decoder.model.bind(params)(*args).expert_ids)
    chosen = np.asarray(run(subject.params, ids, cache, spans)).reshape(subject.config.num_hidden_layers, -1)
    counts = np.stack([np.bincount(layer, minlength=subject.config.num_experts) for layer in chosen])
    return {
        "busiest_expert_over_mean": round(float((counts.max(1) / counts.mean(1)).mean()), 2),
        "unused_experts": round(float((counts == 0).sum(1).mean()), 1),
    }


def prompts(config: Qwen3MoeConfig, count: int, tokens: int, seed: int) -> np.ndarray:
    """Random token ids int32 [count, tokens]."""
    rng = np.random.default_rng((SEED, seed))
    return rng.integers(0, config.vocab_size, (count, tokens), dtype=np.int32)


def admit(batch: Batch, ids: np.ndarray, max_tokens: int | None = None) -> list[int]:
    settings = [Sampling(temperature=1.0, top_k=20, seed=i) for i in range(len(ids))]
    return [batch.admit(p, sampling=s, max_tokens=max_tokens) for p, s in zip(ids, settings, strict=True)]


def step(batch: Batch, tokens: int) -> int:
    """One step; how many tokens it wrote."""
    progress = batch.step(tokens)
    if any(p.finish_reason == "nonfinite" for p in progress):
        raise ArithmeticError("logits are not finite")
    return sum(len(p.tokens) for p in progress)


def read(batch: Batch) -> tuple[float, int]:
    """Steps until no prompt waits: seconds, and tokens written meanwhile."""
    began, written = time.perf_counter(), 0
    while batch.waiting:
        written += step(batch, 1)
    return time.perf_counter() - began, written


def pretend_read(batch: Batch) -> None:
    """Every prompt is read, but keys and values are random: the same for all sequences."""
    cache = batch._state.cache

    @partial(jax.jit, donate_argnums=0)
    def fill(stack: jax.Array, seed: jax.Array) -> jax.Array:
        if stack.dtype == jnp.int8:
            return stack + jnp.int8(seed)
        one = jax.random.normal(jax.random.key(seed), (stack.shape[0], 1, *stack.shape[2:]), stack.dtype)
        return stack + one

    leaves, shape = jax.tree.flatten(cache)
    cache = jax.tree.unflatten(shape, [fill(a, jnp.uint32(i + 1)) for i, a in enumerate(leaves)])
    batch._state = replace(batch._state, cache=cache, filled=batch._state.length - 1)
    for sequence in batch._sequences.values():
        sequence.filled = sequence.length - 1


class Timings:
    """Best seconds of each kind of work; the first round compiles and does not count."""

    def __init__(self, subject: Subject, sequences: int, args: argparse.Namespace):
        self.subject, self.sequences, self.prompt = subject, sequences, args.prompt
        self.steps, self.repeats, self.random_cache = args.steps, args.repeats, args.random_cache
        prompt, steps, repeats = args.prompt, args.steps, args.repeats
        self.batch = subject.batch(sequences, prompt + steps * (repeats + 2) + 2 * sequences + 64)

    def prefill(self) -> dict[str, float]:
        """Every prompt to its first token, and no further."""

        def run(round_: int) -> float:
            admit(self.batch, prompts(self.subject.config, self.sequences, self.prompt, round_), max_tokens=1)
            seconds, _ = read(self.batch)
            self.batch.free_all()
            return seconds

        seconds = self._best(run)
        tokens = self.sequences * self.prompt
        return {"seconds": round(seconds, 5), "tokens_per_second": round(tokens / seconds, 1)}

    def decode(self) -> dict[str, float]:
        admit(self.batch, prompts(self.subject.config, self.sequences, self.prompt, 0))
        if self.random_cache:
            pretend_read(self.batch)
        else:
            read(self.batch)

        def run(_: int) -> float:
            began = time.perf_counter()
            written = step(self.batch, self.steps)
            seconds = time.perf_counter() - began
            if written != self.sequences * self.steps:
                raise RuntimeError(f"{written} tokens in place of {self.sequences} x {self.steps}")
            return seconds / self.steps

        seconds = self._best(run)
        self.batch.free_all()
        return {
            "milliseconds_per_step": round(seconds * 1e3, 3),
            "tokens_per_second": round(self.sequences / seconds, 1),
        }

    def mixed(self) -> dict[str, float]:
        """A quarter of the sequences comes anew while the others are written."""
        count = max(1, self.sequences // 4)
        admit(self.batch, prompts(self.subject.config, self.sequences, self.prompt, 0))
        read(self.batch)
        written: dict[float, int] = {}

        def run(round_: int) -> float:
            for slot in range(count):
                self.batch.free(slot)
            admit(self.batch, prompts(self.subject.config, count, self.prompt, round_ + 1))
            seconds, tokens = read(self.batch)
            written[seconds] = tokens
            return seconds

        seconds = self._best(run)
        self.batch.free_all()
        return {
            "new_prompts": count,
            "seconds": round(seconds, 5),
            "prompt_tokens_per_second": round(count * self.prompt / seconds, 1),
            "written_tokens_per_second": round(written[seconds] / seconds, 1),
        }

    def _best(self, run: Callable[[int], float]) -> float:
        print("  compiles and runs once", flush=True)
        began = time.perf_counter()
        run(0)
        print(f"  first run {time.perf_counter() - began:.1f} s", flush=True)
        return min(run(1 + i) for i in range(self.repeats))


def step_nbytes(subject: Subject, sequences: int, depth: int) -> float:
    """Bytes that one token of all sequences reads at least, where routing is even."""
    config, params = subject.config, subject.params
    missed = (1 - config.num_experts_per_tok / config.num_experts) ** sequences
    head = params["lm_head" if "lm_head" in params else "embed_tokens"]
    total = sum(a.nbytes for a in jax.tree.leaves(head))
    for name, stack in params["layers"].stacks.items():
        used = 1 - missed if "experts" in name else 1.0
        total += used * sum(a.nbytes for a in jax.tree.leaves(stack))
    return total + cache_nbytes(config, depth, jnp.dtype(subject.cache_dtype).itemsize, sequences)


def measure(subject: Subject, sequences: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of results for one number of sequences."""
    rows: list[dict[str, Any]] = []

    def add(work: str, timed: Callable[[], dict[str, Any]], **more: Any) -> None:
        row = {"work": work, "sequences": sequences, "prompt": args.prompt, **more}
        print(f"{sequences} sequences, {work}", flush=True)
        try:
            row |= timed()
        except (jax.errors.JaxRuntimeError, ArithmeticError) as error:  # out of memory: the others may fit
            row["error"] = str(error).splitlines()[0]
        rows.append(row)
        print(row, flush=True)

    timings = Timings(subject, sequences, args)
    if "prefill" in args.work:
        add("prefill", timings.prefill)
    if "decode" in args.work:
        add("decode", timings.decode)
    if "mixed" in args.work and sequences > 1:
        add("mixed", timings.mixed)
    del timings
    if "skewed" in args.work:
        uneven = skewed(subject)
        timings = Timings(uneven, sequences, args)
        if "prefill" in args.work:
            facts = routing(uneven, min(args.prompt, PREFILL_CHUNKS[-1]))
            add("prefill, skewed", timings.prefill, **facts)
        if "decode" in args.work:
            add("decode, skewed", timings.decode)
    operations = prefill_operations(subject.config, sequences, args.prompt)
    devices = len(jax.tree.leaves(subject.params)[0].sharding.device_set)
    floor = step_nbytes(subject, sequences, args.prompt) / (devices * args.bandwidth * 1e12)
    operations /= devices
    for row in rows:
        if row["work"].startswith("prefill") and "seconds" in row:
            row["share_of_limit"] = round(operations / row["seconds"] / (args.tflops * 1e12), 4)
        if row["work"] == "decode" and "milliseconds_per_step" in row:
            row["share_of_limit"] = round(floor / (row["milliseconds_per_step"] / 1e3), 4)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="Qwen3-30B-A3B", choices=["small", *sorted(PRESETS)])
    parser.add_argument("-m", "--model", help='a file in place of random weights, or "embedded"')
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--prompt", type=int, default=512, help="tokens per prompt")
    parser.add_argument("--steps", type=int, default=16, help=f"tokens per dispatch, at most {MAX_STEPS}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-cache", choices=KV_CACHES, help="default: float16 (a file: by the device)")
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--random-cache", action="store_true", help="decode without reading prompts first")
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s that a copy on the card reaches")
    parser.add_argument("--tflops", type=float, default=798.0, help="what the card's matrix product reaches")
    parser.add_argument("--kernels", choices=CHOICES, default=AUTO, help="forces a set of kernels")
    parser.add_argument("--mesh", help="splits the model over devices, such as tp=2,ep=1")
    parser.add_argument("--layers", type=int, help="so many in place of the preset's")
    args = parser.parse_args()
    if args.mesh:
        simulate_devices(MeshShape.parse(args.mesh).size)  # before JAX starts; GPUs stay what they are
    began = time.perf_counter()
    subject = of_file(args) if args.model else of_preset(args)
    device = jax.devices()[0].device_kind
    print(f"{device}: weights ready in {time.perf_counter() - began:.1f} s", flush=True)
    rows = [row for count in args.sequences for row in measure(subject, count, args)]
    facts = {
        "device": device,
        "mesh": args.mesh,
        "model": args.model or args.preset,
        "kv_cache": subject.cache_dtype.name,
    }
    print(json.dumps({**facts, "decode": subject.decoder.describe(), "batches": rows}))


if __name__ == "__main__":
    main()

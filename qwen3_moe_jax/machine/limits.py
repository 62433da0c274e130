"""What a machine allows: the speeds that memory and arithmetic units set, for benchmarks to be held against.

Decoding is limited by memory: every step reads each weight that it uses, and the KV cache, at least
once (``bytes_per_token``). A prompt is limited by arithmetic: the
operations of its matrix products and of causal attention. On an NVIDIA GPU both speeds are the data
sheet's; on a CPU they are measured here, with NumPy, and said to be.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.machine.datasheets import data_sheet, peak_bandwidth
from qwen3_moe_jax.machine.kernels import NATIVE
from qwen3_moe_jax.machine.memory import cache_nbytes
from qwen3_moe_jax.machine.threads import cores

Words = NDArray[np.uint64]

READ_NBYTES = 512 << 20
PRODUCT_SIZE = 1536
REPEATS = 5


@dataclass(frozen=True)
class Limit:
    """A speed and where it comes from: bytes or operations/s; None where unknown."""

    rate: float | None
    origin: str


@dataclass(frozen=True)
class Limits:
    """What limits decoding (``memory``, bytes/s) and prompts (``arithmetic``, operations/s)."""

    memory: Limit
    arithmetic: Limit

    @classmethod
    def of(cls, facts: dict[str, object]) -> "Limits":
        """The limits of the device that a runner's ``describe`` names; measures those of a CPU."""
        device = str(facts["device"])
        if is_cpu(facts):
            kernels = str(facts.get("kernels", "xla"))
            way = "its own kernels" if kernels == NATIVE else "NumPy"
            memory = Limit(
                read_bandwidth(kernels), f"a read of main memory by {cores()} cores, measured with {way}"
            )
            return cls(memory, Limit(product_rate(), "a float32 matrix product, measured with NumPy"))
        return cls(
            _memory_of(device), _arithmetic_of(device, str(facts["backend"]), str(facts["compute_dtype"]))
        )


def is_cpu(facts: dict[str, object]) -> bool:
    """Whether a runner's device is the processor itself."""
    device = str(facts["device"]).lower()
    return bool(facts.get("software")) or "cpu" in device


def _memory_of(device: str) -> Limit:
    peak = peak_bandwidth(device)
    return Limit(peak, f"{device}'s memory, data sheet" if peak else f"no memory speed is known for {device}")


def _arithmetic_of(device: str, backend: str, dtype: str) -> Limit:
    sheet = data_sheet(device)
    if backend != "jax" or dtype != "bfloat16":
        return Limit(None, f"the {backend} backend computes in {dtype} and takes no tensor cores")
    if sheet is None:
        return Limit(None, f"no tensor-core speed is known for {device}")
    return Limit(sheet.flops, f"{device}'s tensor cores, dense 16-bit, data sheet")


def read_bandwidth(kernels: str = "xla") -> float:
    """Bytes/s of a read of main memory by every core that this process may use; the best of a few.

    Args:
      kernels: "native" reads with the vectors and threads of the CPU's own products, where they are loaded;
        else NumPy reads.
    """
    threads = cores()
    parts = [np.ones(READ_NBYTES // 8 // threads, np.uint64) for _ in range(threads)]
    read = _native_read() if kernels == NATIVE else None
    with ThreadPoolExecutor(threads) as pool:
        seconds = [_seconds(parts, read, pool) for _ in range(REPEATS)]
    return sum(part.nbytes for part in parts) / min(seconds)


def _seconds(parts: list[Words], read: Callable[[Words], int] | None, pool: ThreadPoolExecutor) -> float:
    """Of one read of all parts: in turn by ``read``, which has threads, or each by a thread of the pool."""
    began = time.perf_counter()
    sums = [read(part) for part in parts] if read else list(pool.map(_largest, parts))
    seconds = time.perf_counter() - began
    if sums != [len(part) if read else 1 for part in parts]:
        raise RuntimeError(f"what was read is not what was written: {sums}")
    return seconds


def _largest(part: Words) -> int:
    """NumPy's fastest look at every byte."""
    return int(part.view(np.uint8).max())


def _native_read() -> Callable[[Words], int] | None:
    """The sum of some words by the threads of the CPU's own products; None where these are not loaded."""
    from qwen3_moe_jax.kernels_pallas.native import library  # imports JAX, as whoever has them has

    return library.reader()


def product_rate() -> float:
    """Operations/s of a float32 matrix product in NumPy; the best of a few."""
    a = np.ones((PRODUCT_SIZE, PRODUCT_SIZE), np.float32)
    product = np.empty_like(a)
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        np.matmul(a, a, out=product)
        best = min(best, time.perf_counter() - began)
    return 2 * PRODUCT_SIZE**3 / best


def bytes_per_token(source: ModelSource, sequences: int = 1) -> float:
    """Bytes of weights that decoding one token of each sequence reads, in the file's own form.

    Every matrix but the embedding, and of the experts the share that a token chooses; or the share
    that several sequences can be expected to choose together, if routing is even.
    """
    config = source.config
    used = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** sequences
    total = 0.0
    for path, spec in source.specs.items():
        block = BLOCK_FORMATS[source.types[path]]
        weights = 1.0
        for size in spec.shape:
            weights *= size
        if path == "embed_tokens" and not config.tie_word_embeddings:
            weights = spec.shape[-1] * sequences
        share = used if ".experts." in path else 1.0
        total += share * weights / block.weights * block.nbytes
    return total


def step_nbytes(source: ModelSource, itemsize: int, sequences: int, depth: float) -> float:
    """Bytes that one token of each sequence reads at least.

    Args:
      source: the open model.
      itemsize: of a value in the KV cache.
      sequences: that run together; routing is taken as even, so that they use as many different
        experts as can be expected then.
      depth: positions of each sequence in the cache.
    """
    cached = cache_nbytes(source.config, 1, itemsize) * sequences * depth
    return bytes_per_token(source, sequences) + cached


def prefill_operations(config: Qwen3MoeConfig, sequences: int, tokens: int) -> float:
    """Floating-point operations of prompts of ``tokens``, without those for logits of the last ones."""
    c = config
    width, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    dense = c.hidden_size * (2 * width + 2 * kv + c.num_experts)
    experts = 3 * c.hidden_size * c.moe_intermediate_size * c.num_experts_per_tok
    attention = 2 * width * (tokens + 1) / 2
    return 2.0 * c.num_hidden_layers * sequences * tokens * (dense + experts + attention)

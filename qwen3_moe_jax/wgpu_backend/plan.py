"""What a model takes of a device's memory, worked out and checked before any upload."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.core.errors import MemoryPlanError
from qwen3_moe_jax.machine.environment import MEMORY_VARIABLE, parse_bytes
from qwen3_moe_jax.machine.headroom import Headroom, main_memory
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.nvidia import nvidia_gpus
from qwen3_moe_jax.wgpu_backend.adapter import AdapterReport, Tuning
from qwen3_moe_jax.wgpu_backend.sites import max_tiles
from qwen3_moe_jax.wgpu_backend.tiles import rounded_nbytes
from qwen3_moe_jax.wgpu_backend.weights import weight_nbytes

MAX_LOGIT_BYTES = 40 << 20
SHARE_OF_MEMORY = 0.95
"""Share of the free memory that a model may take."""


@dataclass(frozen=True)
class Workspace:
    """Sizes of everything on the device but the weights.

    Attributes:
      context: tokens that the KV cache holds.
      chunk: tokens of a prompt that are computed together.
      logit_rows: rows of logits that are computed together.
      spans: spans of attention of one token at most.
      nbytes: bytes by buffer name; "keys" and "values" are of one layer.
    """

    context: int
    chunk: int
    logit_rows: int
    spans: int
    nbytes: dict[str, int]


def plan_workspace(
    config: Qwen3MoeConfig, tuning: Tuning, max_context: int, max_bytes: int, *, f16_cache: bool
) -> Workspace:
    """Chooses the chunk so that every buffer fits one binding.

    Raises:
      MemoryPlanError: one layer's cache, or the RoPE table, is larger than a binding.
    """
    chunk = min(tuning.chunk, -(-max_context // tuning.prefill_tokens) * tuning.prefill_tokens)
    while True:
        workspace = _sizes(config, tuning, max_context, chunk, f16_cache=f16_cache)
        worst = max(workspace.nbytes, key=workspace.nbytes.__getitem__)
        if workspace.nbytes[worst] <= max_bytes:
            return workspace
        if chunk <= tuning.prefill_tokens:
            raise MemoryPlanError(
                f"a context of {max_context} tokens needs {workspace.nbytes[worst] / 2**20:.1f} MiB for "
                f"{worst}, and the adapter binds at most {max_bytes / 2**20:.1f} MiB: "
                "lower max_context"
            )
        chunk //= 2


def _sizes(
    config: Qwen3MoeConfig, tuning: Tuning, max_context: int, chunk: int, *, f16_cache: bool
) -> Workspace:
    c = config
    heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    pairs = chunk * c.num_experts_per_tok
    hidden = 4 * chunk * c.hidden_size
    logit_rows = max(1, min(chunk, MAX_LOGIT_BYTES // (4 * c.vocab_size)))
    decode_spans = -(-max_context // tuning.decode_span)
    prefill_spans = -(-max_context // tuning.prefill_span)
    if tuning.vectors:
        decode_spans = max(decode_spans, min(-(-max_context // tuning.vectors.tile), tuning.vectors.parts))
    parts = max(decode_spans if decode_spans > 1 else 0, chunk * prefill_spans if prefill_spans > 1 else 0)
    cache = (2 if f16_cache else 4) * kv_heads * max_context * head_dim
    nbytes = {
        "x": hidden,
        "h": hidden,
        "sums": hidden,
        "attn_out": hidden,
        "qkv": 4 * chunk * (heads + 2 * kv_heads) * head_dim,
        "roped": 4 * chunk * (heads + kv_heads) * head_dim,
        "attended": 4 * chunk * heads * head_dim,
        "parts": 4 * parts * heads * (head_dim + 4),
        "router_logits": 4 * chunk * c.num_experts,
        "probs": 4 * chunk * c.num_experts,
        "ids": 4 * pairs * c.num_hidden_layers,
        "replay": 4 * pairs * c.num_hidden_layers,
        "expert_weights": 4 * pairs,
        "act": 3 * 4 * pairs * c.moe_intermediate_size,
        "down": 4 * pairs * c.hidden_size,
        "tiles": 16 * (1 + max_tiles(pairs, c.num_experts, tuning.prefill_tokens)),
        "order": 4 * pairs,
        "tokens": 4 * chunk,
        "logits": 4 * logit_rows * c.vocab_size,
        "seen": 4 * c.vocab_size,
        "rope_table": 4 * max_context * head_dim,
        "keys": cache,
        "values": cache,
    }
    if tuning.tiles and tuning.tiles.dots:
        widest = max(chunk * max(c.hidden_size, heads * head_dim), pairs * c.moe_intermediate_size)
        nbytes["rounded"] = rounded_nbytes(widest)
    return Workspace(max_context, chunk, logit_rows, decode_spans, nbytes)


def plan_memory(config: Qwen3MoeConfig, types: Mapping[str, GGMLType], workspace: Workspace) -> MemoryPlan:
    """Adds up weights, cache and working memory."""
    layers = config.num_hidden_layers
    cache = (workspace.nbytes["keys"] + workspace.nbytes["values"]) * layers
    working = sum(n for name, n in workspace.nbytes.items() if name not in ("keys", "values"))
    return MemoryPlan(weight_nbytes(config, types), cache, workspace.context, working)


def check_memory(plan: MemoryPlan, report: AdapterReport) -> None:
    """Refuses a model that the device cannot hold, before anything is uploaded.

    Raises:
      MemoryPlanError: it does not fit; the message holds the plan.
    """
    plan.check(free_memory(report), f"use a smaller model, or set {MEMORY_VARIABLE} if the figure is wrong")


def free_memory(report: AdapterReport) -> Headroom:
    """What a model may take of an adapter's memory.

    WebGPU does not tell. A software or integrated adapter uses the machine's memory; NVIDIA's
    and AMD's drivers are asked on Linux.
    """
    wanted = os.environ.get(MEMORY_VARIABLE)
    if wanted:
        return Headroom(parse_bytes(wanted), report.name, MEMORY_VARIABLE)
    if report.type in ("CPU", "IntegratedGPU"):
        free = main_memory()
    else:
        free = Headroom(_nvidia_memory(report.name) or _amd_memory(report.driver), report.name)
    return free if free.nbytes is None else free.with_nbytes(int(free.nbytes * SHARE_OF_MEMORY))


def _nvidia_memory(name: str) -> int | None:
    """Free bytes of the card of this name; of several, the maximum."""
    free = [gpu.free for gpu in nvidia_gpus() if gpu.name in name and gpu.free is not None]
    return max(free, default=None)


def _amd_memory(driver: str) -> int | None:
    if "radv" not in driver.lower() and "amd" not in driver.lower():
        return None
    best = None
    for total in Path("/sys/class/drm").glob("card*/device/mem_info_vram_total"):
        try:
            free = int(total.read_text()) - int(total.with_name("mem_info_vram_used").read_text())
        except (OSError, ValueError):
            continue
        best = max(best or 0, free)
    return best

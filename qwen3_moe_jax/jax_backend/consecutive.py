"""Several tokens of one sequence in one step, with the bits that they would have one after the other.

Two paths promise it: Hopper's decode kernel, whose rows then share a row of the cache, and the CPU's native
kernels, where a token's results do not depend on those beside it. XLA's products depend on their shapes.
"""

import jax

from qwen3_moe_jax.jax_backend.decode_path import Decoder, OneKernel, Step, read
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, Span
from qwen3_moe_jax.jax_backend.params import Params
from qwen3_moe_jax.kernels_pallas.all_layers import api as all_layers
from qwen3_moe_jax.kernels_pallas.implementations import NATIVE


def run(
    decoder: Decoder, params: Params, token_ids: jax.Array, start: jax.Array, ends: jax.Array, cache: KVCache
) -> Step:
    """T tokens of one sequence, where there is no ``reason_against``.

    Args:
      token_ids: int32 [1, T].
      start: int32 [1], the position of the first.
      ends: int32 [1], the position after the last; what is from there on is padding.
    """
    path = decoder.path(params, token_ids.shape[1], cache)
    if isinstance(path, OneKernel):
        return path.consecutive(decoder.model, params, token_ids, start, cache)
    return read(decoder.model, params, token_ids, [Span(start, token_ids.shape[1], ends=ends)], cache)


def reason_against(decoder: Decoder, params: Params, rows: int, cache: KVCache) -> str | None:
    """Why so many tokens of a sequence at once may have other bits than one after the other, or None.

    Args:
      params, cache: arrays, or their shapes.
    """
    if decoder.shards is not None:
        return "the model is split over several devices"
    if isinstance(decoder.path(params, rows, cache), OneKernel):
        if decoder.model.kernels == "portable":
            return "with the portable decode kernel it has not run on a GPU"
        return None if cache.scales is None else "with an int8 cache it has not run on a GPU"
    if decoder.model.kernels != NATIVE:
        why = dict(decoder.refused).get(OneKernel.name, "as asked")
        return f"neither a GPU's decode kernel ({why}) nor the CPU's native kernels run"
    why = all_layers.reason_against(params["layers"], cache.k)
    return why and f"the CPU's native kernels do not run all of it: {why}"

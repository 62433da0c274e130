"""In which ways tokens are written, taken from the disk where that was found out before.

Finding out asks the kernels, whose import takes half a second of the interpreter, beside the load of the
weights, which needs it too. A start that finds its programs on disk has no other use for them.
"""

import json
from typing import Any

import jax.numpy as jnp

from qwen3_moe_jax.jax_backend import programs
from qwen3_moe_jax.jax_backend.decode_path import PATHS, Decoder, choose
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.params import Params, Types
from qwen3_moe_jax.jax_backend.program_key import digest, environment, fingerprint
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.kernels_pallas.gpu import device as gpu

_BY_NAME = {path.name: path for path in PATHS}


def remembered_choice(
    model: Qwen3Moe, types: Types, params: Params, device: Device, cache_dtype: Any
) -> Decoder:
    """As ``decode_path.choose``.

    Args:
      types: of the file that ``params`` are of: what these look like follows from them and the device.
    """
    if device.platform != "gpu" or model.shards is not None or (store := programs.store()) is None:
        return choose(model, params, device, cache_dtype)
    key = _key(model, types, device, cache_dtype)
    content = store.get(key)
    found = None if content is None else _decoder(model, content)
    if found is not None and gpu.tell_runtime():
        return found
    decoder = choose(model, params, device, cache_dtype)
    told = {"paths": [path.name for path in decoder.paths], "refused": decoder.refused}
    store.put(key, json.dumps(told).encode())
    return decoder


def _key(model: Qwen3Moe, types: Types, device: Device, cache_dtype: Any) -> str:
    """SHA-256 of all that the choice depends on."""
    facts = {
        "choice": __name__,
        "model": fingerprint(model),
        "types": fingerprint(types),
        "cache": jnp.dtype(cache_dtype).name,
        "shared memory": getattr(device, "shared_memory_per_block_optin", None),
        "environment": environment(),
    }
    return digest(facts)


def _decoder(model: Qwen3Moe, content: bytes) -> Decoder | None:
    """What was written; None for anything else."""
    try:
        told = json.loads(content)
        paths = tuple(_BY_NAME[name] for name in told["paths"])
        return Decoder(model, paths, tuple((str(name), str(why)) for name, why in told["refused"]))
    except (ValueError, KeyError, TypeError):
        return None

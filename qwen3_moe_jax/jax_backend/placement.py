"""Where a model lies: on one device, or split over several."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.convert.packed import LANES
from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.errors import OptionError
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.kv_cache import KVCache
from qwen3_moe_jax.jax_backend.params import GPU_ROLES, Params, load_params, split_path
from qwen3_moe_jax.jax_backend.sharded_params import connect, dequantized_tile, device_nbytes, load_sharded
from qwen3_moe_jax.jax_backend.sharding import MeshShape, Shards, process_of
from qwen3_moe_jax.kernels_pallas import Matrices, dequantize
from qwen3_moe_jax.machine.headroom import available_memory
from qwen3_moe_jax.machine.kernels import AUTO, NATIVE, Kernels, capability_of, choose_kernels
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.processes import joined

ADVICE = "split the model over more devices"


@dataclass(frozen=True)
class Placement:
    """One device, or the devices of a mesh.

    Attributes:
      device: the only one, or the first of this process: they are alike.
      shards: how the model is split; None on one device.
    """

    device: Any
    shards: Shards | None = None

    @classmethod
    def of(
        cls, source: ModelSource, mesh: MeshShape | Literal["auto"] | None, devices: Sequence[Device]
    ) -> "Placement":
        """On the first devices of these, as many as the mesh has. ``devices``: of all processes.

        Raises:
          OptionError: the model cannot be split so, or the devices are too few.
        """
        processes = len(set(map(process_of, devices)))
        if processes > 1 and joined() is None:
            raise OptionError(
                f"JAX has joined {processes} processes by itself: leave jax.distributed.initialize out, and "
                "give load distributed=Processes(...)"
            )
        if mesh is None:
            if processes > 1:
                raise OptionError(
                    f"there are {processes} processes: mesh says how the model is split over their devices, "
                    "such as ep=2 or auto"
                )
            return cls(devices[0])
        config, types = source.config, source.types
        shape = MeshShape.fitting(config, types, len(devices), processes) if mesh == "auto" else mesh
        shape.check(config, types)
        if shape.size == 1 and processes == 1:
            return cls(devices[0])
        shards = Shards.of(shape, config, devices)
        return cls(shards.own_devices[0], shards)

    @property
    def is_gpu(self) -> bool:
        return self.device.platform == "gpu"

    def dequantized(self, params: Params, path: str, tile: int, expert: int | None) -> np.ndarray:
        """As ``Runner.dequantized``."""
        if self.shards is not None:
            return dequantized_tile(params, self.shards, path, tile, expert, _dequantize_rows)
        layer, name = split_path(path)
        if layer is None:
            value, first, rows = params[path], 0, params[path].shape[0]
        else:
            tensor = params["layers"][name]
            value, first, rows = tensor.options[tensor.which[layer]], tensor.first[layer], tensor.rows
        if expert is not None:
            rows //= params["layers"][name].shape[0]
            first += expert * rows
        count = min(LANES, rows - LANES * tile)
        w = Matrices(value, jnp.int32(first + LANES * tile), (count, value.shape[1]))
        return np.asarray(_dequantize_rows(w))

    def plan(self, source: ModelSource, length: int, itemsize: int) -> MemoryPlan:
        """What one device is going to hold; all of this process on a CPU, whose devices share main memory.

        One CPU's weights stay in a file where its memory does not hold them.

        Args:
          length: positions of the cache, of ``itemsize`` bytes per value.

        Raises:
          MemoryPlanError: it does not fit.
        """
        plan, advice = self.planned(source, length, itemsize), ADVICE
        if self.shards is None:
            free = available_memory(self.device)
            plan = plan.settled(free)
            plan.check(free)
            return plan
        for device in self.shards.own_devices if self.is_gpu else [self.device]:
            plan.check(available_memory(device), advice=advice)
        return plan

    def planned(self, source: ModelSource, length: int, itemsize: int) -> MemoryPlan:
        """As ``plan``, whether it fits or not."""
        plan, shards = MemoryPlan.of(source, length, itemsize), self.shards
        if shards is None:
            return plan
        parts = 1 if self.is_gpu else len(shards.own_indices)
        weights, cache = device_nbytes(shards, source.types), shards.cache_nbytes(length, itemsize)
        return replace(plan, weights=weights * parts, cache=cache * parts)

    def describe(self, source: ModelSource) -> str | None:
        """For people: the mesh, and what each device has; None on one device."""
        if self.shards is None:
            return None
        nbytes = device_nbytes(self.shards, source.types)
        return f"{self.shards.describe()}, {nbytes / 1e9:.3g} GB of weights per device"

    def load(self, source: ModelSource, plan: MemoryPlan, progress: ProgressCallback | None) -> Params:
        """The parameters, on every device what it has of them; ``plan`` is what :meth:`plan` gave."""
        if self.shards is None:
            return load_params(source, GPU_ROLES if self.is_gpu else {}, self.device, progress, plan)
        params = load_sharded(source, self.shards, self.device, progress)
        if self.shards.processes > 1:
            connect(self.shards)
        return params

    def kernels(self, wanted: str) -> Kernels:
        """Those that are asked for, or the fastest; on a mesh of GPUs Hopper's or XLA's.

        Raises:
          BackendUnavailableError: the device does not run what is asked for.
        """
        capability, is_auto = capability_of(self.device), wanted in (AUTO, NATIVE)
        chosen = choose_kernels(AUTO if is_auto else wanted, capability, jax.__version_info__)
        if self.shards is not None and self.is_gpu and is_auto and chosen.name == "portable":
            return Kernels("xla", "the portable kernels have not been tried on a mesh")
        return chosen

    def empty_cache(self, config: Qwen3MoeConfig, rows: int, length: int, dtype: Any) -> KVCache:
        """A cache where the weights are."""
        if self.shards is None:
            return KVCache.create(config, rows, length, dtype, self.device)
        return KVCache.create(config, rows, length, dtype, self.shards.of_cache, self.shards.cache_heads)


@jax.jit
def _dequantize_rows(w: Matrices) -> jax.Array:
    """All rows of a matrix."""
    return dequantize(w.slice(0, w.rows))

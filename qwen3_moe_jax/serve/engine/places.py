"""Where each of several engines of one host runs: GPUs of its own, or a share of cores and of main memory.

All of this is decided before JAX starts, by what the children find in their environment; what the user has
set there stays.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.errors import MemoryPlanError, OptionError
from qwen3_moe_jax.core.mesh import AUTO_MESH, mesh_sizes
from qwen3_moe_jax.machine import threads
from qwen3_moe_jax.machine.environment import THREADS_VARIABLE
from qwen3_moe_jax.machine.headroom import Headroom, main_memory
from qwen3_moe_jax.machine.jax_devices import CARDS_VARIABLE
from qwen3_moe_jax.machine.memory import MIN_POSITIONS, MemoryPlan
from qwen3_moe_jax.machine.nvidia import nvidia_gpus
from qwen3_moe_jax.machine.probe import cards_are_hidden_by
from qwen3_moe_jax.serve.engine.frames import Start

SLOT_SHARE = 0.5
"""Of the main memory that all models leave, what all slots may take."""


@dataclass(frozen=True)
class Place:
    """Of one engine.

    Attributes:
      variables: of its environment.
      slot_bytes: of main memory for its slots; None where it has memory of its own.
    """

    variables: Mapping[str, str]
    slot_bytes: int | None = None


def places_for(start: Start, count: int) -> list[Place]:
    """A place for each of ``count`` engines.

    Raises:
      OptionError: there are too few GPUs, or the backend has one place alone.
      MemoryPlanError: main memory does not hold so many.
    """
    if start.backend == "wgpu" or start.adapter is not None:
        raise OptionError(f"--replicas {count}: the wgpu backend runs one engine: leave out --replicas")
    cards = visible_cards() if start.backend in ("auto", "jax") else []
    return _on_cards(cards, count, start.mesh) if cards else _on_cpu(start, count)


def visible_cards() -> list[str]:
    """The NVIDIA GPUs that JAX is going to see, as ``CUDA_VISIBLE_DEVICES`` names them.

    Raises:
      OptionError: the GPUs are cut in parts, and the user has named none of these.
    """
    found = nvidia_gpus()
    if not found or cards_are_hidden_by():
        return []
    listed = os.environ.get(CARDS_VARIABLE)
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    if any(card.is_partitioned for card in found):
        raise OptionError(f"--replicas: MIG is on: name the GPUs' parts in {CARDS_VARIABLE} (nvidia-smi -L)")
    return [str(number) for number in range(len(found))]


def _on_cards(cards: Sequence[str], count: int, mesh: str | None) -> list[Place]:
    """As many cards for each as its mesh has devices."""
    each = len(cards) // count if mesh == AUTO_MESH else devices_of(mesh)
    if not each or count * each > len(cards):
        kind = f"--replicas {count}" + (f" of --mesh {mesh}" if mesh else "")
        needed = count * max(each, 1)
        raise OptionError(f"{kind} needs {needed} GPUs: {len(cards)} can be seen ({', '.join(cards)})")
    groups = [cards[n * each : (n + 1) * each] for n in range(count)]
    return [Place({CARDS_VARIABLE: ",".join(group)}) for group in groups]


def devices_of(mesh: str | None) -> int:
    """Devices of an engine, as far as the mesh says it.

    Raises:
      ValueError: the mesh is none.
    """
    return 1 if mesh in (None, AUTO_MESH) else math.prod(mesh_sizes(mesh).values())


def _on_cpu(start: Start, count: int) -> list[Place]:
    """The same threads and the same memory for each, so that all answer alike."""
    cores = max(1, threads.cores() // count)
    own = {threads.VARIABLE: str(cores), THREADS_VARIABLE: str(max(cores, devices_of(start.mesh)))}
    variables = {name: os.environ.get(name, value) for name, value in own.items()}
    return [Place(variables, _slot_bytes(start, count, main_memory()))] * count


def _slot_bytes(start: Start, count: int, free: Headroom) -> int | None:
    """Bytes of main memory for the slots of each engine.

    Raises:
      MemoryPlanError: so many engines do not fit.
    """
    if free.nbytes is None:
        return None
    plan = _least_plan(start)
    needed = plan.total + start.prefix_bytes
    if count * needed > free.nbytes:
        fitting = free.nbytes // needed
        raise MemoryPlanError(
            f"{count} replicas take {count * needed / 1e9:.2f} GB ({plan}, each) and do not fit {free}: "
            + (f"--replicas {fitting} would fit" if fitting else "not even one does")
        )
    left = free.nbytes // count - plan.weights - plan.working - start.prefix_bytes
    return max(int(left * SLOT_SHARE), plan.cache)


def _least_plan(start: Start) -> MemoryPlan:
    """What one engine needs, with slots that are of use."""
    with open_model(start.model or loader.embedded_model()) as source:
        context = min(start.context or MIN_POSITIONS, source.config.max_position_embeddings)
        itemsize = loader.ITEM_BYTES[start.kv_cache or "float32"]
        return MemoryPlan.of(source, (start.slots or 1) * context, itemsize)

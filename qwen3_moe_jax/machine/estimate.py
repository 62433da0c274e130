"""What a model is going to be like here before it is loaded: whether it fits, how fast it is.

Decoding is bound by the bytes that a token reads. A backend reaches a share of the memory's speed that was
measured: on an H100 650 tokens/s of 1.92 GB are 0.37 of its data sheet's 3.35 TB/s (104 through Vulkan:
0.06), on a CPU with 4 cores 5.2 tokens/s of XLA's operations are 0.30 of a copy's speed; the native kernels
were not measured with a file of that size. The portable kernel writes 642 tokens/s of the same model there
(docs/receipts/decode_portable_full_h100.json), some 1 % less in a program with sampling: 0.36. On a card
that was not measured this is a guess; waits are a smaller part of the time where memory is slower. Small
models are bound by launches instead: nothing is expected to be faster than ``MAX_TOKENS`` per second.
"""

import functools
from dataclasses import dataclass

from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.machine.datasheets import peak_bandwidth
from qwen3_moe_jax.machine.headroom import Headroom, main_memory
from qwen3_moe_jax.machine.kernels import AUTO, NATIVE, choose_kernels, installed_jax
from qwen3_moe_jax.machine.limits import read_bandwidth, step_nbytes
from qwen3_moe_jax.machine.memory import MemoryPlan
from qwen3_moe_jax.machine.nvidia import NvidiaGpu, nvidia_gpus
from qwen3_moe_jax.machine.probe import cards_are_hidden_by

SHARES = {"jax hopper": 0.39, "jax portable": 0.36, "wgpu": 0.06, "jax cpu": 0.30}
"""Of the memory's speed, by :attr:`Place.way`; XLA's operations on a GPU have no receipt."""

MAX_TOKENS = 1000.0
"""Tokens/s of one sequence that launches and the host allow on any machine."""


@dataclass(frozen=True)
class Place:
    """Where a model is going to run.

    Attributes:
      backend: one of ``loader.BACKENDS``.
      memory: what is free there.
      bandwidth: bytes/s; None where unknown.
      origin: of the bandwidth, in words.
      itemsize: bytes of a value in the KV cache.
      kernels: of ``machine.kernels``: what the jax backend takes there.
    """

    backend: str
    memory: Headroom
    bandwidth: float | None
    origin: str
    itemsize: int
    kernels: str = "xla"

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU: its KV cache is float16 there."""
        return self.itemsize == 2

    @property
    def way(self) -> str:
        """What computes, as SHARES names it."""
        if self.backend != "jax":
            return self.backend
        return f"jax {self.kernels if self.on_gpu else 'cpu'}"

    def settled(self, plan: MemoryPlan) -> MemoryPlan:
        """What a load does with a plan: jax lets a CPU's weights that do not fit stay in a file."""
        return plan.settled(self.memory) if self.backend == "jax" else plan

    def rate(self, source: ModelSource, depth: int) -> float | None:
        """Expected tokens/s of one sequence with ``depth`` tokens in its cache; None where unknown."""
        share = SHARES.get(self.way)
        if self.bandwidth is None or share is None:
            return None
        return min(MAX_TOKENS, share * self.bandwidth / step_nbytes(source, self.itemsize, 1, depth))


def _free_card() -> NvidiaGpu | None:
    cards = [] if cards_are_hidden_by() else [card for card in nvidia_gpus() if card.free]
    return max(cards, key=lambda c: c.free or 0, default=None)


def free_card() -> Headroom | None:
    """The NVIDIA card with the most free memory; None where none can be used."""
    card = _free_card()
    return None if card is None else Headroom(card.free, card.name)


def machine_memory() -> Headroom:
    """What a model can have: of the NVIDIA card with the most free memory, else main memory."""
    return free_card() or main_memory()


def place_of(backend: str) -> Place:
    """Where a backend is going to run; measures a CPU's memory speed once per process."""
    card = _free_card() if backend == "jax" else None
    if card is not None:
        return place_on(card)
    if backend == "jax":
        kernels = "xla" if native_is_ruled_out() else NATIVE
        return Place(backend, main_memory(), _measured(), "a read of main memory, measured now", 4, kernels)
    return Place(backend, main_memory(), None, "not known", 2 if backend == "wgpu" else 4)


def place_on(card: NvidiaGpu) -> Place:
    """The jax backend on an NVIDIA card, with the fastest kernels that this has."""
    kernels = choose_kernels(AUTO, card.capability, installed_jax()).name
    memory = Headroom(card.free, card.name)
    return Place("jax", memory, peak_bandwidth(card.name), f"{card.name}'s data sheet", 2, kernels)


def native_is_ruled_out() -> bool:
    """Whether a CPU's native kernels do not run, as far as is known without the library, which may have to
    be compiled."""
    from qwen3_moe_jax.kernels_pallas.native import forms  # imports JAX

    if forms.is_off():
        return True
    try:
        forms.choose_form()
    except NotImplementedError:
        return True
    return False


@functools.cache
def _measured() -> float:
    return read_bandwidth()

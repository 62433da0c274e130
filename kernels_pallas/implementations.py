"""What every op's ``api`` shares: the choice of an implementation, its record, the check of a dtype."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.kernels_pallas.packed.stacks import LayerTable, Matrices, OneOf

Implementation = Literal["xla", "hopper", "portable", "native"]

NATIVE = "native"
"""Integer dots on the CPU: activations are rounded to 15 bits, so it is for those who ask for it."""


@dataclass(frozen=True)
class Ran:
    """What ran an op once, or will run it each time that the traced program runs.

    Attributes:
      op: the op's name.
      types: quantization types of its packed arguments, without repeats.
      implementation: its name.
      refused: what those before it said against these arguments, "hopper: the reason".
    """

    op: str
    types: tuple[GGMLType, ...]
    implementation: str
    refused: tuple[str, ...] = ()


@dataclass
class Record:
    """What ran, each way once, in the order of the first time."""

    _ran: dict[Ran, None] = field(default_factory=dict)

    def add(self, ran: Ran) -> None:
        self._ran.setdefault(ran)

    def __iter__(self) -> Iterator[Ran]:
        return iter(tuple(self._ran))

    def __bool__(self) -> bool:
        return bool(self._ran)

    def of_type(self, ggml_type: GGMLType) -> str | None:
        """What multiplies by matrices of this type, "hopper" or "hopper and xla"; or None."""
        mine = [ran for ran in self if ggml_type in ran.types and ran.op != "embedding_lookup"]
        return " and ".join(sorted({ran.implementation for ran in mine})) or None

    def refusals(self) -> list[str]:
        """A line for each op and types that an implementation has refused."""
        return [
            f"{ran.op}{' of ' if ran.types else ''}{', '.join(t.name for t in ran.types)}: "
            f"{ran.implementation}; {'; '.join(ran.refused)}"
            for ran in self
            if ran.refused
        ]


_records: ContextVar[tuple[Record, ...]] = ContextVar("records", default=())

ANY = "any"
"""No choice of kernels: the first implementation that does not refuse runs."""

_kernels: ContextVar[str] = ContextVar("kernels", default=ANY)


@contextmanager
def using(kernels: str) -> Iterator[None]:
    """Ops whose implementation is not named take this one, or "xla" where it refuses, meanwhile.

    Args:
      kernels: "hopper", "portable", "native", "xla", or ANY, which is no "native".
    """
    token = _kernels.set(kernels)
    try:
        yield
    finally:
        _kernels.reset(token)


@contextmanager
def recording(record: Record | None = None) -> Iterator[Record]:
    """Notes what runs meanwhile in this thread; in a jitted program, while it is traced."""
    record = Record() if record is None else record
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)


def replay(ran: Iterable[Ran]) -> None:
    """Tells those who are recording what a program that was traced before runs."""
    for record in _records.get():
        for one in ran:
            record.add(one)


def note(op: str, implementation: str, weights: Iterable[Any], refused: Iterable[str] = ()) -> None:
    """Tells those who are recording that this implementation ran with these arguments."""
    if records := _records.get():
        types = dict.fromkeys(t for w in weights for t in _types_of(w))
        for record in records:
            record.add(Ran(op, tuple(types), implementation, tuple(refused)))


def _types_of(w: Any) -> list[GGMLType]:
    if isinstance(w, LayerTable):
        return [t for stack in w.stacks.values() for t in _types_of(stack)]
    if isinstance(w, OneOf):
        return [option.stack.type for option in w.options]
    if isinstance(w, Matrices):
        return [w.stack.type]
    return [w.type] if isinstance(w, PackedTensor) else []


def run(
    op: str,
    implementation: Implementation | None,
    candidates: Mapping[str, Callable[..., Any]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs the named implementation, or the first that supports the arguments when none is named.

    Args:
      op: the op's name, for messages.
      implementation: None or a candidate's name.
      candidates: functions by name, in order of preference.

    Raises:
      NotImplementedError: the named implementation does not exist or does not support the arguments.
    """
    if implementation is not None and implementation not in candidates:
        raise NotImplementedError(f"{op}: {implementation=} (there is {', '.join(candidates)})")
    reasons: list[str] = []
    for name, function in candidates.items():
        if name not in ((implementation,) if implementation else _allowed(candidates)):
            continue
        try:
            result = function(*args, **kwargs)
        except NotImplementedError as error:
            if implementation is not None:
                raise
            reasons.append(f"{name}: {error}")
            continue
        note(op, name, args, reasons)
        return result
    raise NotImplementedError(f"{op}: no implementation takes these arguments: {'; '.join(reasons)}")


def _allowed(candidates: Iterable[str]) -> tuple[str, ...]:
    """Names of the candidates that the choice of kernels leaves."""
    kernels = _kernels.get()
    return tuple(name for name in candidates if name != NATIVE) if kernels == ANY else (kernels, "xla")


def check_compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype that operands are rounded to: float32 or bfloat16."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"compute_dtype must be float32 or bfloat16, not {dtype.name}")
    return dtype

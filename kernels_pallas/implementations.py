"""What every op's ``api`` shares: the choice of an implementation and the check of the compute dtype."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Implementation = Literal["xla", "pallas"]


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
      implementation: None, "xla" or "pallas".
      candidates: functions by name, in order of preference.

    Raises:
      NotImplementedError: the named implementation does not exist or does not support the arguments.
    """
    if implementation is not None:
        if implementation not in candidates:
            raise NotImplementedError(f"{op}: {implementation=} (there is {', '.join(candidates)})")
        return candidates[implementation](*args, **kwargs)
    reasons = []
    for function in candidates.values():
        try:
            return function(*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(str(error))
    raise NotImplementedError(f"{op}: no implementation takes these arguments: {'; '.join(reasons)}")


def check_compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype that operands are rounded to: float32 or bfloat16."""
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"compute_dtype must be float32 or bfloat16, not {dtype.name}")
    return dtype

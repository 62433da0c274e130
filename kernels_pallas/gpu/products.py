"""The grouped matrix product by device: what the operations on packed weights are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from qwen3_moe_jax.kernels_pallas.gpu import device, grouped_matmul_sm80, grouped_matmul_sm90


class Product(NamedTuple):
    """One kernel.

    Attributes:
      require: raises NotImplementedError where it does not run; takes the interpreter's parameters.
      multiply: as ``grouped_matmul_sm90.grouped_matmul``.
    """

    require: Callable[[Any], None]
    multiply: Callable[..., jax.Array]


HOPPER = Product(lambda interpret: device.require_hopper(interpret), grouped_matmul_sm90.grouped_matmul)
PORTABLE = Product(lambda interpret: device.require_ampere(interpret), grouped_matmul_sm80.grouped_matmul)

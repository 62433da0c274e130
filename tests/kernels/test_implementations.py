"""Which implementation ran is told by what ran, with the reasons of those that refused."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.convert.ggml_types import GGMLType
from qwen3_moe_jax.kernels_pallas import implementations, quantized_matmul
from qwen3_moe_jax.kernels_pallas.gpu import device
from qwen3_moe_jax.kernels_pallas.implementations import Ran, Record, recording, run
from tests.kernels.op_inputs import random_weights, rng

__all__ = ["rng"]


def refuse(*args):
    raise NotImplementedError("no such shape")


def test_a_shape_that_the_kernel_refuses_runs_in_xla_and_the_record_says_why(rng):
    """The GPU's kernel itself is asked: it takes no weights that lie in rows."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="GPU kernels need JAX 0.11")
    w = random_weights(rng, GGMLType.Q4_K, (16, 256))
    x = jnp.asarray(rng.normal(size=(3, 256)), jnp.float32)
    with (
        mock.patch.object(device, "require_hopper", return_value=None),
        recording() as record,
    ):
        quantized_matmul(x, w, compute_dtype=jnp.bfloat16)
    (ran,) = record
    assert (ran.op, ran.types, ran.implementation) == ("quantized_matmul", (GGMLType.Q4_K,), "xla")
    assert "rows" in ran.refused[0]
    assert record.of_type(GGMLType.Q4_K) == "xla"
    assert record.refusals()[0].startswith("quantized_matmul of Q4_K: xla; hopper: ")


def test_the_first_that_does_not_refuse_is_recorded():
    record = Record()
    with recording(record), recording() as inner:
        assert run("op", None, {"hopper": refuse, "xla": lambda x: x + 1}, 1) == 2
        assert run("op", "xla", {"hopper": refuse, "xla": lambda x: x}, 1) == 1
    assert list(record) == list(inner)
    assert list(record) == [Ran("op", (), "xla", ("hopper: no such shape",)), Ran("op", (), "xla")]
    run("op", None, {"xla": lambda x: x}, 1)
    assert len(list(record)) == 2, "nobody records any more"


def test_a_named_implementation_that_refuses_leaves_no_record():
    with recording() as record, pytest.raises(NotImplementedError, match="no such shape"):
        run("op", "hopper", {"hopper": refuse, "xla": lambda x: x}, 1)
    assert not record
    with pytest.raises(NotImplementedError, match="hopper: no such shape; xla: no such shape"):
        run("op", None, {"hopper": refuse, "xla": refuse}, 1)
    with pytest.raises(NotImplementedError, match="there is xla"):
        run("op", "hopper", {"xla": refuse}, 1)


def test_a_jitted_program_is_recorded_while_it_is_traced(rng):
    w = jax.tree.map(jnp.asarray, random_weights(rng, GGMLType.Q6_K, (16, 256)))
    with recording() as record:
        jax.eval_shape(quantized_matmul, jax.ShapeDtypeStruct((3, 256), np.float32), w)
    assert [ran.implementation for ran in record] == ["xla"]


def test_a_type_that_two_implementations_multiply_says_both():
    record = Record()
    q4 = (GGMLType.Q4_K,)
    for ran in (Ran("moe_mlp", q4, "hopper"), Ran("quantized_matmul", q4, "xla")):
        record.add(ran)
    record.add(Ran("embedding_lookup", (GGMLType.Q6_K,), "xla"))
    assert record.of_type(GGMLType.Q4_K) == "hopper and xla"
    assert record.of_type(GGMLType.Q6_K) is None, "a lookup multiplies by nothing"


def test_every_op_is_public():
    from qwen3_moe_jax import kernels_pallas as ops

    assert {"decode_layers", "attention", "rms_norm", "rope"} <= set(ops.__all__)
    assert implementations.run.__doc__

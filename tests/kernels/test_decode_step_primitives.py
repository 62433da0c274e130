"""The bodies of the decode kernel's primitives have the same names and arguments, those of the Protocol."""

import importlib
import inspect

import jax
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.kernels_pallas.decode_step import primitives
from qwen3_moe_jax.kernels_pallas.decode_step.primitives.names import Primitives

METHODS = {name: f for name, f in vars(Primitives).items() if inspect.isfunction(f) and name[0] != "_"}


def arguments(function) -> list[tuple]:
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("body", primitives.BODIES)
def test_a_body_has_every_primitive_and_no_other(body):
    module = importlib.import_module(f"{primitives.__name__}.{body}")
    own = {n for n, f in vars(module).items() if callable(f) and n[0] != "_" and n not in ("Any", "partial")}
    assert own == METHODS.keys() | {"View"}
    for name in ("__init__", "load", "store", "send"):
        wanted = arguments(getattr(importlib.import_module(f"{primitives.__name__}.sm90").View, name))
        assert arguments(getattr(module.View, name)) == wanted


@pytest.mark.parametrize("body", primitives.BODIES)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_primitive_takes_what_the_protocol_says(body, name):
    given = arguments(getattr(importlib.import_module(f"{primitives.__name__}.{body}"), name))
    wanted = arguments(METHODS[name])[1:]
    assert given[: len(wanted)] == wanted
    assert {n for n, _ in given[len(wanted) :]} <= {"fence", "scope"}, "which a body has set"

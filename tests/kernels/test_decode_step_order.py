"""The decode kernel's docstring says which phase waits for which: held against what the kernel does."""

import importlib
import inspect
import os
import re
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11):
    pytest.skip("the GPU kernels need JAX 0.11", allow_module_level=True)

from qwen3_moe_jax.kernels_pallas.decode_step import attention, kernel
from qwen3_moe_jax.kernels_pallas.decode_step.activations import Activations
from qwen3_moe_jax.kernels_pallas.decode_step.api import Device
from qwen3_moe_jax.kernels_pallas.decode_step.attention import Attention
from qwen3_moe_jax.kernels_pallas.decode_step.exchange import ONE_DEVICE, Slots, Split
from qwen3_moe_jax.kernels_pallas.decode_step.experts import Experts
from qwen3_moe_jax.kernels_pallas.decode_step.grid import Grid
from qwen3_moe_jax.kernels_pallas.decode_step.projections import Projections
from qwen3_moe_jax.kernels_pallas.decode_step.router import Router
from qwen3_moe_jax.testing.decode_kernel import trace_step

PHASES = {
    "norm": (Activations, "share_normed"),
    "qkv": (Projections, "qkv"),
    "attention": (Attention, "attend"),
    "join": (Attention, "join"),
    "output": (Projections, "output"),
    "router": (Router, "router"),
    "gate_up": (Experts, "gate_up"),
    "down": (Experts, "down"),
    "logits": (Projections, "logits"),
}
ROW = re.compile(r"^ {4,6}(\w+) +\S.*? {2,}(\w+) +(\w+|-)$", re.MULTILINE)


def table() -> list[tuple[str, str, str]]:
    """(phase, what it waits for, who signals) of the docstring, of a layer and what follows the layers."""
    rows = ROW.findall(kernel.__doc__)
    assert [name for name, _, _ in rows] == [*list(PHASES)[:-1], "norm", "logits"]
    return rows


def recorded(batch: int, mesh: Split) -> list[tuple[str, str]]:
    """(phase, event) in the order of the traced kernel, repetitions by types taken out.

    Events: "wait", "wait for devices", "signal", "signal to all" where devices could be told, and "prefetch"
    of tiles of keys and values.
    """
    found, inside = [], ["kernel"]

    def phase(name, original):
        def run(*args, **kwargs):
            inside.append(name)
            original(*args, **kwargs)
            inside.pop()

        return run

    def event(what, original):
        def run(*args, **kwargs):
            here = f"{what} to all" if kwargs.get("to_all") else what.replace("_", " ")
            if found[-1:] != [(inside[-1], here)]:
                found.append((inside[-1], here))
            return original(*args, **kwargs)

        return run

    patches = [(owner, method, phase(n, getattr(owner, method))) for n, (owner, method) in PHASES.items()]
    events = ("wait", "wait_for_devices", "signal")
    patches += [(Grid, what, event(what, getattr(Grid, what))) for what in events]
    patches.append((attention.Attending, "prefetch", event("prefetch", attention.Attending.prefetch)))
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        trace_step(batch=batch, device=Device.of_cores(114, mesh=mesh))
    return found


def test_each_row_of_the_docstring_waits_for_the_row_before_it():
    """One counter orders all phases: the first of a layer waits for the last of the layer before it."""
    *rows, norm, logits = table()
    names = [name for name, _, _ in rows]
    assert [waited for _, waited, _ in rows] == [names[-1], *names[:-1]]
    assert [norm[1], logits[1]] == [names[-1], "norm"]


@pytest.mark.parametrize(
    ("batch", "mesh"), [(1, ONE_DEVICE), (3, ONE_DEVICE), (1, Split(2)), (3, Split(1, 2))]
)
def test_phases_wait_and_signal_in_the_order_of_the_docstring(batch, mesh):
    expected, signalled = [], {name: signals for name, _, signals in table()}
    for name, waited, signals in table():
        if name == "norm" and batch == 1:
            continue  # a single sequence is normed inside the phases
        waited = "down" if waited == "norm" and batch == 1 else waited
        is_all = mesh.devices > 1 and signalled[waited] == "all"
        if name == "qkv" and batch == 1:
            expected.append((name, "prefetch"))
        expected.append((name, "wait for devices" if is_all else "wait"))
        if signals != "-":
            expected.append((name, "signal to all" if signals == "all" else "signal"))
    expected.append(("kernel", "signal"))
    if mesh.devices > 1:
        expected.append(("kernel", "wait for devices"))  # the other devices still write into this one
    assert recorded(batch, mesh) == expected


@pytest.mark.parametrize(("batch", "devices"), [(1, 1), (3, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("attention_signals", [1, 2])
def test_each_phase_waits_for_all_signals_before_it(batch, devices, is_split, attention_signals):
    """Two layers, with the counts as numbers: none too few (a race) and none too many (a wait for ever)."""
    blocks, layers = 112, 2
    owners = batch if batch > 1 else 0
    c = SimpleNamespace(batch=batch, blocks=blocks, num_hidden_layers=layers, num_key_value_heads=4)
    c.shares, c.devices, c.attention_signals = batch > 1, devices, attention_signals
    elsewhere = (
        () if devices == 1 else ("output", "down")
    )  # what is signalled to all has a counter of its own
    sent, called, left = 0, [], []

    def phase(name):
        def run(*args, also_ahead=None):
            nonlocal sent
            assert int(args[-1]) == sent, name
            called.append(name)
            times = attention_signals if name == "attention" else 1
            sent += 0 if name in elsewhere else times * blocks + (owners if name in ("qkv", "logits") else 0)

        return run

    body = kernel.Kernel.__new__(kernel.Kernel)
    body.c = c
    body.g = SimpleNamespace(semaphore=True)
    body.leave_zero = left.append
    items = batch * 4 + is_split
    body.attention = SimpleNamespace(
        plan_splits=lambda: jnp.int32(items), attend=phase("attention"), join=phase("join")
    )
    body.attention.prefetch = lambda layer: None
    body.projections = SimpleNamespace(qkv=phase("qkv"), output=phase("output"), logits=phase("logits"))
    body.router = SimpleNamespace(router=phase("router"))
    body.experts = SimpleNamespace(gate_up=phase("gate_up"), down=phase("down"))

    def loop(first, last, run, carry):
        for i in range(first, last):
            carry = run(i, carry)
        return carry

    when = lambda condition: lambda run: run() if condition else None
    with mock.patch.object(kernel.lax, "fori_loop", loop), mock.patch.object(kernel.pl, "when", when):
        body.token()
    names = [name for name, _, _ in table() if name != "norm" and (is_split or name != "join")]
    assert called == names[:-1] * layers + names[-1:]
    assert [int(count) for count in left] == [sent]


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_wait_for_all_parts_before_they_add_them(devices):
    """Every block signals to all after each output projection and after each down."""
    waited = []
    grid = SimpleNamespace(c=SimpleNamespace(devices=devices), wait_for_devices=waited.append)
    for layer in range(3):
        Grid.wait_for_down(grid, layer, None)
        Grid.wait_for_output(grid, layer, None)
    Grid.wait_for_down(grid, 3, None)
    assert waited == list(range(7))


@pytest.mark.parametrize(("devices", "parts"), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_every_part_is_added_once_and_none_is_overwritten_before(devices, parts):
    """The state with numbers for arrays; a device that is ahead writes before others have read."""
    slots, rng = Slots(devices, parts), np.random.default_rng(3)
    state, total = np.zeros(slots.number, int), 7
    state[0] = total
    add = lambda where: state[where].sum()
    for layer in range(4):
        assert add(slots.before(layer)) == total
        output = rng.integers(1, 100, devices)
        if devices == 1:
            state[0] = add(slots.before(layer)) + output[0]
        else:
            for device, value in enumerate(
                output
            ):  # all at once, while the slowest still adds what was before
                state[slots.output(device, layer)] = value
            assert add(slots.before(layer)) == total
            state[0] = add(slots.before(layer))
        total += output.sum()
        assert add(slots.after_output(layer)) == total
        for device in range(devices):
            for part in range(parts):
                state[slots.down(device, part)] = value = rng.integers(1, 100)
                total += value


@pytest.mark.parametrize(("name", "phase"), [("router", PHASES["router"]), ("norm", PHASES["norm"])])
def test_what_a_measurement_puts_in_a_phase_s_place_takes_its_arguments(monkeypatch, name, phase):
    """``profile_decode --without``: otherwise the kernel is not even traced."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # the import changes it
    profile_decode = importlib.import_module("scripts.profile_decode")
    owner, method = phase
    original = getattr(owner, method)
    arguments = [None] * len(inspect.signature(original).parameters)
    with mock.patch.object(owner, method, original):
        profile_decode.WITHOUT[name]()
        instead = getattr(owner, method)
    assert instead is not original
    inspect.signature(instead).bind(*arguments)

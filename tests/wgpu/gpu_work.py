"""What the tests do on a GPU: every function here runs in the spawned process, on kept devices and models."""

import contextlib
import gc
import io
import math
import os
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.core.runner import Forward
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.testing.wgpu_ops import Ops
from qwen3_moe_jax.wgpu_backend import device as device_module
from qwen3_moe_jax.wgpu_backend import feed
from qwen3_moe_jax.wgpu_backend import runner as runner_module
from qwen3_moe_jax.wgpu_backend.adapter import SMALL_TILES, TUNINGS, Vectors, probe
from qwen3_moe_jax.wgpu_backend.device import Device
from qwen3_moe_jax.wgpu_backend.layout import device_nbytes, device_words
from qwen3_moe_jax.wgpu_backend.reorder import Reorder
from qwen3_moe_jax.wgpu_backend.runner import WgpuRunner
from scripts import profile_wgpu

EMBEDDED = Path(__file__).parents[2] / "qwen3_moe_jax" / "assets" / "tiny-coder-Q4_K_M.gguf"
CONTEXT = 512

_FLOATS = replace(SMALL_TILES, dots=None)
_HARDWARE = replace(TUNINGS["DiscreteGPU"], chunk=96, prefill_span=256, tiles=_FLOATS)
_EIGHT_LANES = Vectors(lanes=8, router_lanes=8, subgroup=8, tile=32, parts=3)

DEVICES: dict[str, dict[str, Any]] = {
    # What the adapter asks for by itself.
    "own": {},
    # Settings of hardware: lanes share a row and sum through shared memory; joined kernels, tiles.
    "hardware": {"tuning": _HARDWARE, "subgroups": False},
    # The same without wgpu's checks, with values exchanged inside a subgroup; llvmpipe's have 8 lanes.
    # Attention's parts take several tiles each.
    "subgroups": {
        "tuning": replace(_HARDWARE, lanes=8, vectors=_EIGHT_LANES, tiles=replace(_FLOATS, lane_rows=8)),
        "subgroups": True,
        "unchecked": True,
    },
    # Hardware with an instruction for dots of bytes.
    "dots": {"tuning": replace(_HARDWARE, tiles=SMALL_TILES), "subgroups": False},
    # Hardware whose adapter or model suits neither: the kernels that every one can run.
    "plain": {"tuning": replace(_HARDWARE, tiles=None, vectors=None, decode_span=128), "subgroups": False},
    # A binding limit so small that every large tensor is cut into windows.
    "small bindings": {"max_bytes": 300 << 10},
}


def no_adapter_reason() -> str | None:
    """Why nothing can run here."""
    try:
        probe()
    except BackendUnavailableError as error:
        return str(error)
    return None


def jax_is_loaded() -> bool:
    return "jax" in sys.modules


def device_facts() -> tuple[str, bool]:
    report = device("own").report
    return report.summary, report.software


@cache
def device(name: str) -> Device:
    return Device(**DEVICES[name])


@cache
def ops(name: str = "own") -> Ops:
    return Ops(device(name))


@dataclass(frozen=True)
class Kept:
    """A tensor that this process holds, so that it crosses only once."""

    number: int


_kept: list[PackedTensor] = []


def keep(tensor: PackedTensor) -> Kept:
    _kept.append(tensor)
    return Kept(len(_kept) - 1)


def forget() -> None:
    _kept.clear()


def op(method: str, *args: Any, on: str = "own", **kwargs: Any) -> Any:
    """Calls one method of ``Ops``."""
    held = (_kept[a.number] if isinstance(a, Kept) else a for a in args)
    return getattr(ops(on), method)(*held, **kwargs)


def moe(x: np.ndarray, stacks: Sequence[Kept], ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """gate, up and SwiGLU, down, and the weighted sum: [T, D]."""
    gate, up, down = (_kept[s.number] for s in stacks)
    decode = len(ids) == 1
    swiglu = ops().expert_matmul(x, ids, gate, up, decode=decode)
    outputs = ops().expert_matmul(swiglu, ids, down, decode=decode)
    zero = np.zeros((len(ids), outputs.shape[-1]), np.float32)
    return ops().norm(zero, np.ones(outputs.shape[-1], np.float32), 1e-6, outputs, weights)[0]


@cache
def runner(model: str, on: str, f16_cache: bool = False) -> WgpuRunner:
    with open_model(model) as source:
        return WgpuRunner(source, max_context=CONTEXT, device=device(on), f16_cache=f16_cache)


def forward(
    model: str,
    tokens: Sequence[int],
    *,
    on: str = "own",
    f16_cache: bool = False,
    capture: Collection[str] = (),
    **options: Any,
) -> Forward:
    return runner(model, on, f16_cache).forward(tokens, capture=capture, **options)


def kernels_of(model: str, on: str) -> tuple[set[str], set[str]]:
    """Names of the kernels of a token and of a long prompt."""
    loaded = runner(model, on)
    programs = loaded._decode, loaded._prefill_of(64)
    token, prompt = ({site.dispatch.kernel.name for site in program.body} for program in programs)
    return token, prompt


def described(model: str, on: str) -> dict[str, object]:
    return runner(model, on).describe()


def log_likelihoods(model: str, tokens: Sequence[int], first: int, on: str = "own") -> np.ndarray:
    return runner(model, on).log_likelihoods(tokens, first=first)


def stream(
    model: str,
    tokens: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    on="own",
) -> list[int]:
    return list(runner(model, on).stream(tokens, max_tokens=max_tokens, sampling=sampling, stop_ids=stop_ids))


def decode_logits(
    model: str, prompt: Sequence[int], count: int, on: str = "own"
) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits that chose the last of them, as the decode kernels left them."""
    loaded = runner(model, on)
    tokens = list(loaded.stream(prompt, max_tokens=count, sampling=Sampling()))
    logits = loaded._device.read(loaded._buffers["logits"], np.float32, loaded.config.vocab_size)
    return tokens, logits


def abandon_streams(model: str, count: int) -> list[int]:
    """Starts streams that nobody reads to the end, with batches in flight, then runs one that is read."""
    in_flight = Device(tuning=replace(device("own").tuning, submits_in_flight=3))
    with open_model(model) as source:
        loaded = WgpuRunner(source, max_context=CONTEXT, device=in_flight)
    for i in range(count):
        unread = loaded.stream([1, 2, 3], max_tokens=100, sampling=Sampling())
        for _ in range(1 + i % 5):
            next(unread)
        del unread
        gc.collect()
    return list(loaded.stream([1, 2, 3], max_tokens=12, sampling=Sampling()))


def tokens_on_their_way(model: str, on: str, count: int) -> tuple[int, int]:
    """Of a stream: most tokens that were queued and not yet given, and how often a thread of wgpu waited."""
    loaded, given, ahead, waits = runner(model, on), 0, [], []
    poller, submit = loaded._device._device._poller, runner_module._Batches.submit

    def watched(batches: Any, tokens: int, launches: Any) -> None:
        submit(batches, tokens, launches)
        ahead.append(count - batches._left - given)

    def token() -> Any:
        waits.append(1)
        return asked()

    asked = poller.get_token
    with (
        mock.patch.object(runner_module._Batches, "submit", watched),
        mock.patch.object(poller, "get_token", token),
    ):
        for _ in loaded.stream([1, 2, 3], max_tokens=count, sampling=Sampling()):
            given += 1
    assert given == count
    return max(ahead), len(waits)


def memory_growth(model: str, count: int, sampling: Sampling) -> int:
    """Bytes by which this process grows over short streams, after a first few."""
    loaded = runner(model, "own")

    def run(times: int) -> int:
        for _ in range(times):
            list(loaded.stream(range(40), max_tokens=4, sampling=sampling))
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = run(5)
    return run(count) - before


class Spoilt:
    """A model source with one tensor replaced."""

    def __init__(self, source: ModelSource, path: str, value: float):
        self._source = source
        self._path = path
        self._value = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def tensor(self, path: str) -> PackedTensor:
        tensor = self._source.tensor(path)
        if path == self._path:
            tensor.arrays["w"][...] = self._value
        return tensor


def raised(action: str, *args: Any) -> tuple[str, str]:
    """Type and message of the error that ``action`` ends with."""
    return raised_by(lambda: globals()[f"_{action}"](*args))


def raised_by(call: Callable[[], object]) -> tuple[str, str]:
    """Type and message of the error that ``call`` ends with."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def _load(**kwargs: Any) -> WgpuRunner:
    with open_model(EMBEDDED) as source:
        return WgpuRunner(source, **{"max_context": 64, **kwargs})


def _nonfinite_stream(path: str, value: float) -> None:
    with open_model(EMBEDDED) as source:
        loaded = WgpuRunner(Spoilt(source, path, value), max_context=64, device=device("own"))
    list(loaded.stream([1, 2, 3], max_tokens=4, sampling=Sampling()))


def _overlong_forward() -> None:
    runner(str(EMBEDDED), "own").forward(np.ones(CONTEXT + 1, int))


def _full_prompt() -> None:
    runner(str(EMBEDDED), "own").stream(np.ones(CONTEXT, int), max_tokens=1, sampling=Sampling())


def _empty_prompt() -> None:
    runner(str(EMBEDDED), "own").stream([], max_tokens=1, sampling=Sampling())


def _bad_token() -> None:
    runner(str(EMBEDDED), "own").forward([1, 4096])


def _bad_expert() -> None:
    runner(str(EMBEDDED), "own").forward([1], expert_ids=np.full((6, 1, 4), 16))


def _empty_forward() -> None:
    runner(str(EMBEDDED), "own").forward([])


def _bad_layer() -> None:
    runner(str(EMBEDDED), "own").forward([1], layers=[6])


def _bad_stage() -> None:
    runner(str(EMBEDDED), "own").forward([1], capture=["ffn_mope"])


def _closed(call: str) -> None:
    loaded = _load()
    waiting = loaded.stream([1, 2], max_tokens=8, sampling=Sampling())
    next(waiting)
    loaded.close()
    if call == "forward":
        loaded.forward([1])
    elif call == "stream":
        list(loaded.stream([1], max_tokens=1, sampling=Sampling()))
    else:
        list(waiting)


def _device_counts() -> tuple[int, int, int]:
    """Devices, buffers and their bytes that wgpu itself counts in this process."""
    import wgpu

    found = wgpu.diagnostics.get_dict()["object_counts"]
    return found["Device"]["count"], found["Buffer"]["count"], found["Buffer"].get("resource_mem", 0)


def closing_counts() -> list[tuple[int, int, int]]:
    """What wgpu counts before a load, then with the model, closed, after a failed load, with a second model.

    A stream, an exception of it and the closed runner are held throughout.
    """
    gc.collect()
    found, held = [_device_counts()], []
    try:
        with _load() as loaded:
            stream = loaded.stream([1, 2, 3], max_tokens=40, sampling=Sampling())
            next(stream)
            found.append(_device_counts())
            loaded.forward([-1])
    except ValueError as error:
        held += [error, stream, loaded]
    found.append(_device_counts())
    failing = mock.patch.object(WgpuRunner, "_build", side_effect=ZeroDivisionError)
    with failing, pytest.raises(ZeroDivisionError) as failed:
        _load()
    found.append(_device_counts())
    held.append(failed)
    with _load() as second:
        assert list(second.stream([1, 2, 3], max_tokens=4, sampling=Sampling()))
        found.append(_device_counts())
    return [*found, _device_counts()] if held else []


def damaged_load(path: Path) -> tuple[tuple[str, str], bool]:
    """How the load of a damaged file ends, and whether wgpu has everything back while the error is held."""
    gc.collect()
    before = _device_counts()
    with open_model(path) as source, pytest.raises(ModelFileError) as failed:
        WgpuRunner(source, max_context=64)
    return (failed.typename, str(failed.value)), _device_counts() == before


def closed_calls() -> dict[str, tuple[str, str]]:
    """What each method of a runner says that a thread has closed in the middle of a stream; closed twice."""
    loaded, begun = _load(), []
    run = loaded._device.run

    def closing_run(*args: Any) -> None:
        if not begun:
            begun.append(threading.Thread(target=loaded.close))
            begun[0].start()
        run(*args)

    loaded._device.run = closing_run
    broken = loaded.stream([1, 2, 3], max_tokens=60, sampling=Sampling())
    in_the_middle = raised_by(lambda: list(broken))
    begun[0].join()
    loaded.close()
    assert loaded.describe()["backend"] == "wgpu"
    assert loaded.cache_nbytes > 0
    calls = {
        "forward": lambda: loaded.forward([1]),
        "log_likelihoods": lambda: loaded.log_likelihoods([1, 2]),
        "stream": lambda: loaded.stream([1], max_tokens=1, sampling=Sampling()),
        "generate_batch": lambda: loaded.generate_batch([[1]], max_tokens=1, sampling=Sampling()),
        "open_batch": lambda: loaded.open_batch(1),
        "dequantized": lambda: loaded.dequantized("lm_head", 0),
        "set_max_context": lambda: loaded.set_max_context(32),
        "retune": lambda: loaded.retune(TUNINGS["CPU"], subgroups=False),
        "__enter__": loaded.__enter__,
        "device": lambda: loaded._device.readback(None, 16),
    }
    return {"stream in the middle": in_the_middle} | {n: raised_by(call) for n, call in calls.items()}


def _overtaken() -> None:
    loaded = runner(str(EMBEDDED), "own")
    older = loaded.stream([1, 2], max_tokens=8, sampling=Sampling())
    next(older)
    loaded.forward([5])
    list(older)


def _plan_too_large() -> None:
    _load(max_context=4096)


def _context_larger_than_a_binding() -> None:
    _load(max_context=1 << 20)


def _wrong_adapter() -> None:
    _load(adapter="Voodoo 2")


def differences_of_reordered(path: Path, piece: int) -> list[str]:
    """Tensors of a file whose words differ from those of the host when the device puts them in order."""
    own, wanted = device("own"), []
    with open_model(path) as source, mock.patch.object(feed, "UPLOAD_PIECE", piece):
        for name, spec in source.specs.items():
            if len(spec.shape) > 1:
                buffer = own.buffer(64 + device_nbytes(source.types[name], math.prod(spec.shape)), name)
                wanted.append(feed.Rows(name, 0, math.prod(spec.shape[:-1]), buffer, 64))
        read = list(feed.write_all(own, source, wanted, Reorder(own)))
        assert len(read) > len(wanted), "pieces"
        wrong = []
        for rows in wanted:
            words = device_words(source.tensor(rows.path))
            found = own.read(rows.buffer, np.uint8, 64 + words.size)
            if found[:64].any() or found[64:].tobytes() != words.tobytes():
                wrong.append(f"{rows.path} {source.types[rows.path].name}")
    return wrong


def profiled(arguments: Sequence[str], *, timestamps: bool) -> str:
    """What ``scripts.profile_wgpu`` prints, on this adapter or as on one without timestamps."""
    shown = io.StringIO()
    with (
        contextlib.redirect_stdout(shown),
        mock.patch.object(device_module, "TIMESTAMPS", device_module.TIMESTAMPS if timestamps else ("none",)),
    ):
        assert profile_wgpu.main(arguments) == 0
    return shown.getvalue()

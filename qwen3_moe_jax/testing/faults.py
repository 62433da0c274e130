"""Ten faults to plant in a backend, so that tests see ``verify`` fail and ``bisect`` name the cause.

For tests alone: nothing of the package imports this module. Faults of weights
and of the config are planted by a source that lies to the backend; faults of
code by replacing functions of the backend's module while it runs.
"""

import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from threading import RLock
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from qwen3_moe_jax.convert.fused import with_parts
from qwen3_moe_jax.convert.ggml_types import BLOCK_FORMATS, GGMLType
from qwen3_moe_jax.convert.gguf_file import GGUFFile
from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.convert.unpack import pack
from qwen3_moe_jax.core.runner import Forward, Runner
from qwen3_moe_jax.testing.fault_list import Fault

MakeRunner = Callable[[ModelSource], Runner]

DROPPED_CHUNK = 16


def plant(fault: Fault, source: ModelSource, make_runner: MakeRunner, *, shaders: bool = False) -> Any:
    """A backend with the fault in it.

    Args:
      fault: one of FAULTS.
      source: the true model.
      make_runner: loads a backend from a source.
      shaders: whether the backend is wgpu, whose code is shaders.
    """
    if programs := sys.modules.get("qwen3_moe_jax.jax_backend.programs"):
        programs.use_store(None)  # a program on disk has the key of the code as it is written
    if fault.name in _LIES:
        return make_runner(LyingSource(source, *_LIES[fault.name](source)))
    if shaders and fault.name in _SHADER_EDITS:
        with _edited_shaders(_SHADER_EDITS[fault.name]):
            return make_runner(source)
    runner = make_runner(source)
    if fault.name == "last-chunk" and runner.name != "jax":
        return DroppingRunner(runner)
    return _PATCHED[runner.name](fault, runner)


# A source that lies


class LyingSource(ModelSource):
    """A model source that gives the backend another config or other tensors."""

    def __init__(
        self,
        truth: ModelSource,
        tensors: Mapping[str, Callable[[PackedTensor], PackedTensor]],
        config: Mapping[str, Any] | None = None,
    ):
        self._truth = truth
        self._changed = {path: change(truth.tensor(path)) for path, change in tensors.items()}
        self.path, self.metadata, self.specs = truth.path, truth.metadata, truth.specs
        self.nbytes, self.identity = truth.nbytes, truth.identity
        self.config = replace(truth.config, **(config or {}))
        self.types = {**truth.types, **{path: t.type for path, t in self._changed.items()}}

    def tensor(self, path: str) -> PackedTensor:
        return self._changed.get(path) or self._truth.tensor(path)

    def tensor_nbytes(self, path: str) -> int:
        return self._truth.tensor_nbytes(path)

    def sha256(self, progress=None) -> str:
        return self._truth.sha256(progress)

    def close(self) -> None:
        """The truth is closed by whoever opened it."""


def _wrong_sub_scale(packed: PackedTensor) -> PackedTensor:
    arrays = {name: array.copy() for name, array in packed.arrays.items()}
    arrays["scales"][7, 100, 3] ^= 32
    return PackedTensor(arrays, packed.type, packed.layout)


def _swap(packed: PackedTensor) -> PackedTensor:
    order = np.arange(packed.shape[0])
    order[[2, 5]] = order[[5, 2]]
    return packed[order]


def _misread(source: ModelSource, path: str, as_type: GGMLType) -> PackedTensor:
    """The tensor's bytes taken for those of another type."""
    with GGUFFile.open(source.path) as file:
        raw = file.read(with_parts(file.tensors, source.config)[source.specs[path].gguf_name])
    return misread(raw, as_type, source.specs[path].shape)


def misread(raw: np.ndarray, as_type: GGMLType, shape: Sequence[int]) -> PackedTensor:
    """Raw bytes taken for blocks of ``as_type``, from the first byte on."""
    block = BLOCK_FORMATS[as_type]
    needed = int(np.prod(shape)) // block.weights * block.nbytes
    return pack(np.resize(raw, needed), as_type, tuple(shape))


def _lie_of_sub_scale(_source: ModelSource) -> tuple:
    return ({"layers.3.mlp.experts.up_proj": _wrong_sub_scale},)


def _lie_of_theta(_source: ModelSource) -> tuple:
    return ({}, {"rope_theta": 10000.0})


def _lie_of_swapped_experts(_source: ModelSource) -> tuple:
    return ({f"layers.1.mlp.experts.{name}": _swap for name in ("gate_proj", "up_proj", "down_proj")},)


def _lie_of_type(source: ModelSource) -> tuple:
    path = "layers.2.mlp.experts.down_proj"
    return ({path: lambda _packed: _misread(source, path, GGMLType.Q4_K)},)


_LIES: dict[str, Callable[[ModelSource], tuple]] = {
    "sub-scale": _lie_of_sub_scale,
    "rope-theta": _lie_of_theta,
    "swapped-experts": _lie_of_swapped_experts,
    "misread-type": _lie_of_type,
}


# A backend whose functions are replaced while it runs

Patch = tuple[ModuleType, str, Any]

_ONE_AT_A_TIME = RLock()
"""Functions are replaced for the whole process."""


class PatchedRunner:
    """A runner whose modules have other functions while it computes."""

    def __init__(self, runner: Runner, patches: Sequence[Patch]):
        self._runner = runner
        self._patches = patches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    @contextmanager
    def _patched(self) -> Iterator[None]:
        with _ONE_AT_A_TIME, ExitStack() as stack:
            for module, name, value in self._patches:
                stack.enter_context(mock.patch.object(module, name, value))
            yield

    def forward(self, token_ids: Sequence[int], **options: Any) -> Forward:
        with self._patched():
            return self._runner.forward(token_ids, **options)

    def stream(self, token_ids: Sequence[int], **options: Any) -> Generator[int]:
        with self._patched():
            tokens = list(self._runner.stream(token_ids, **options))
        yield from tokens


class DroppingRunner(PatchedRunner):
    """A runner that never sees the last chunk of a prompt."""

    def __init__(self, runner: Runner):
        super().__init__(runner, ())

    def forward(self, token_ids: Sequence[int], **options: Any) -> Forward:
        seen = _without_last_chunk(len(token_ids))
        if options.get("expert_ids") is not None:
            options["expert_ids"] = options["expert_ids"][:, :seen]
        return super().forward(token_ids[:seen], **options)

    def stream(self, token_ids: Sequence[int], **options: Any) -> Generator[int]:
        return super().stream(token_ids[: _without_last_chunk(len(token_ids))], **options)


def _without_last_chunk(length: int) -> int:
    return length if length <= DROPPED_CHUNK else (length - 1) // DROPPED_CHUNK * DROPPED_CHUNK


def _patch_reference(fault: Fault, runner: Runner) -> Any:
    from qwen3_moe_jax.reference import model, ops

    heads = runner.config.num_attention_heads

    def rms_norm(x, weight, eps, true=model.rms_norm):
        return x if x.ndim == 3 and x.shape[1] == heads else true(x, weight, eps)

    def late_softmax(logits, count, forced=None, true=model.choose_experts):
        _, ids, weights = true(logits, count, forced)
        probs = np.zeros_like(logits)
        chosen = ops.softmax(np.take_along_axis(logits, ids, axis=-1))
        np.put_along_axis(probs, ids, chosen, axis=-1)
        return probs, ids, weights

    def not_renormalized(logits, count, forced=None, true=model.choose_experts):
        probs, ids, _ = true(logits, count, forced)
        return probs, ids, np.take_along_axis(probs, ids, axis=-1)

    def attention(q, k, v, positions, workers, true=model.attention):
        order = _modulo_order(q.shape[1], k.shape[1])
        out = np.empty_like(q)
        out[:, order] = true(q[:, order], k, v, positions, workers)
        return out

    def rope_tables(config, count, true=model.rope_tables):
        return tuple(table[1:] for table in true(config, count + 1))

    return PatchedRunner(
        runner,
        {
            "q-norm": [(model, "rms_norm", rms_norm)],
            "late-softmax": [(model, "choose_experts", late_softmax)],
            "no-renormalization": [(model, "choose_experts", not_renormalized)],
            "gqa-map": [(model, "attention", attention)],
            "position": [(model, "rope_tables", rope_tables)],
        }[fault.name],
    )


def _modulo_order(heads: int, kv_heads: int) -> np.ndarray:
    """Query heads in an order in which ``n // groups`` of the place is ``n % K`` of the head."""
    return np.array(sorted(range(heads), key=lambda n: (n % kv_heads, n)))


def _patch_jax(fault: Fault, runner: Any) -> Any:
    import jax
    import jax.numpy as jnp

    import qwen3_moe_jax.kernels_pallas as ops
    from qwen3_moe_jax.jax_backend import forward, generate, model

    heads = runner.config.num_attention_heads

    def rms_norm(x, weight, eps):
        return x if x.ndim == 4 and x.shape[2] == heads else ops.rms_norm(x, weight, eps)

    def late_softmax(logits, count, forced=None):
        _, ids, weights = ops.choose_experts(logits, count, forced)
        chosen = jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)
        rows = jnp.arange(logits.shape[0])[:, None]
        return jnp.zeros_like(logits).at[rows, ids].set(chosen), ids, weights

    def not_renormalized(logits, count, forced=None):
        probs, ids, _ = ops.choose_experts(logits, count, forced)
        return probs, ids, jnp.take_along_axis(probs, ids, axis=-1)

    def attention(q, k_cache, v_cache, positions, **options):
        order = _modulo_order(heads, runner.config.num_key_value_heads)
        out = ops.attention(q[:, :, order], k_cache, v_cache, positions, **options)
        return out[:, :, np.argsort(order)]

    def rope_tables(positions, *facts):
        return ops.rope_tables(positions + 1, *facts)

    def chunk_lengths(count, sizes=generate.PREFILL_CHUNKS, true=generate.chunk_lengths):
        chunks = true(count, sizes)
        return chunks[:-1] if len(chunks) > 1 else chunks

    if fault.name == "last-chunk":
        return PatchedRunner(runner, [(forward, "chunk_lengths", chunk_lengths)])
    wrong = {
        "q-norm": {"rms_norm": rms_norm},
        "late-softmax": {"choose_experts": late_softmax},
        "no-renormalization": {"choose_experts": not_renormalized},
        "gqa-map": {"attention": attention},
        "position": {"rope_tables": rope_tables},
    }[fault.name]
    # Another class, so that no program compiled for the true model is taken for this one.
    faulty = type("FaultyQwen3Moe", (model.Qwen3Moe,), {})
    true = runner.model
    settings = {f.name for f in fields(true)} - {"parent", "name"}
    faulty_model = faulty(**{name: getattr(true, name) for name in settings})
    runner.decoder = replace(runner.decoder, model=faulty_model)
    names = {name: getattr(ops, name) for name in ops.__all__}
    return PatchedRunner(runner, [(model, "ops", SimpleNamespace(**{**names, **wrong}))])


# wgpu computes in shaders: each edit is (shader, pattern, replacement) on the rendered source.

Edit = tuple[str, str, str]

_HEAD_OF_PLACE = """
fn head_of_place(place: u32) -> u32 {
  let groups = p.heads / p.kv_heads;
  return (place % groups) * p.kv_heads + place / groups;
}
"""

_SHADER_EDITS: dict[str, tuple[Edit, ...]] = {
    "q-norm": (
        ("rope", r"let a = (.*?) / root (.*?);", r"let a = select(\1, \1 / root \2, is_key);"),
        ("rope", r"let b = (.*?) / root (.*?);", r"let b = select(\1, \1 / root \2, is_key);"),
    ),
    "position": (("rope", r"table\[position \*", "table[(position + 1u) *"),),
    "late-softmax": (
        (
            "router",
            r"(weights\[wg\.y \* p\.chosen \+ choice\] = (.*?);\n  \})",
            r"""\1
  storageBarrier();
  if (lane == 0u) {
    for (var e = 0u; e < p.experts; e++) { probs[first + e] = 0.0; }
    for (var choice = 0u; choice < p.chosen; choice++) {
      let id = picked[choice];
      probs[first + id] = \2;
    }
  }""",
        ),
    ),
    "no-renormalization": (("router", r" / max\(weight_sum, SMALLEST_WEIGHT_SUM\)", ""),),
    "gqa-map": (
        (
            "attention",
            r"\+ head\) \* (\d+)u \+ i\]",
            r"+ head_of_place(head + i / \1u)) * \1u + i % \1u]",
        ),
        (
            "attention",
            r"\(token \+ 0u\) \* p\.heads \+ head \+ (\d+)u",
            r"wg.y * p.heads + head_of_place(head + \1u)",
        ),
        ("attention", r"(?=@compute)", _HEAD_OF_PLACE),
    ),
}


@contextmanager
def _edited_shaders(edits: Sequence[Edit]) -> Iterator[None]:
    """Shaders are compiled with these edits.

    Raises:
      ValueError: an edit no longer fits its shader.
    """
    from qwen3_moe_jax.wgpu_backend import device

    def render(name: str, true: Callable[..., str] = device.render, **constants: Any) -> str:
        code = true(name, **constants)
        for shader, pattern, replacement in edits:
            if shader == name:
                code, count = re.subn(pattern, replacement, code, flags=re.DOTALL)
                if not count:
                    raise ValueError(f"{name}.wgsl has changed: the fault's pattern {pattern!r} is not in it")
        return code

    with mock.patch.object(device, "render", render):
        yield


_PATCHED: dict[str, Callable[[Fault, Runner], Runner]] = {
    "reference": _patch_reference,
    "jax": _patch_jax,
}

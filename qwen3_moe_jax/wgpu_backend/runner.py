"""The wgpu backend behind the ``Runner`` protocol."""

import gc
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from qwen3_moe_jax.convert.progress import ProgressCallback
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.errors import NumericalError
from qwen3_moe_jax.core.likelihood import target_log_likelihoods
from qwen3_moe_jax.core.lookup import PromptLookup
from qwen3_moe_jax.core.one_at_a_time import OneAtATime
from qwen3_moe_jax.core.runner import (
    Forward,
    ForwardOptions,
    Platform,
    TokenIds,
)
from qwen3_moe_jax.core.runner_arguments import (
    check_open,
    checked_forward,
    checked_prompt,
    checked_text,
)
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import StageKey
from qwen3_moe_jax.wgpu_backend import kernels
from qwen3_moe_jax.wgpu_backend.adapter import Tuning
from qwen3_moe_jax.wgpu_backend.buffers import EMITTED_WORD, Buffers, sampling_words, step_words
from qwen3_moe_jax.wgpu_backend.device import Device, Launch, Readback
from qwen3_moe_jax.wgpu_backend.plan import check_memory, plan_memory, plan_workspace
from qwen3_moe_jax.wgpu_backend.program import Program
from qwen3_moe_jax.wgpu_backend.sites import Site
from qwen3_moe_jax.wgpu_backend.weights import Upload, check_shapes

NONFINITE = 0xFFFFFFFF
"""What sample.wgsl emits in place of a token."""


class WgpuRunner(OneAtATime):
    """The model on one WebGPU adapter; see ``runner.Runner`` for the protocol.

    One request runs at a time: a new one ends what an older stream could still give.

    Attributes:
      plan: what the model takes of the device's memory.
    """

    name = "wgpu"

    def __init__(
        self,
        source: ModelSource,
        *,
        max_context: int | None = None,
        adapter: str | None = None,
        f16_cache: bool = False,
        exact: bool = False,
        device: Device | None = None,
        progress: ProgressCallback | None = None,
    ):
        """Loads the model.

        Args:
          source: an open model; not needed afterwards.
          max_context: tokens that the KV cache holds; default the model's own limit.
          adapter: part of the wanted adapter's summary.
          f16_cache: half the cache's memory, at an error of about 1e-4 in the logits.
          exact: float32 products in long prompts too, where kernels else round activations to 16 bits.
          device: an open device, in place of a new one on ``adapter``.
          progress: told of the bytes that are uploaded.

        Raises:
          BackendUnavailableError: no adapter, or one that lacks something.
          MemoryPlanError: the model does not fit its memory.
        """
        self.is_closed = False
        self._lock = threading.Lock()
        self._request = 0
        self._streams: weakref.WeakSet[_Batches] = weakref.WeakSet()
        self.config = source.config
        self.max_context = source.config.max_position_embeddings if max_context is None else max_context
        check_shapes(self.config, source.types)
        self._owns_device = device is None
        self._device = device or Device(adapter, exact=exact)
        self.platform: Platform = "cpu" if self._device.report.software else "gpu"
        self._types = sorted(
            {t.name for path, t in source.types.items() if "norm" not in path.split(".")[-1]}
        )
        self._f16 = f16_cache
        try:
            self._load(source, progress)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # who keeps the error must not keep the buffers
            self.close()
            raise

    def _load(self, source: ModelSource, progress: ProgressCallback | None) -> None:
        device = self._device
        workspace = plan_workspace(
            self.config, device.tuning, self.max_context, device.max_bytes, f16_cache=self._f16
        )
        self.plan = plan_memory(self.config, source.types, workspace)
        check_memory(self.plan, device.report)
        upload = Upload(device, source, progress)
        self._weights = upload.weights
        self._buffers = Buffers(device, self.config, workspace, self.max_context)
        self._choice = device.buffer(32, "sampling", uniform=True)
        with ThreadPoolExecutor(1, thread_name_prefix="compile") as beside:
            built = beside.submit(self._build)
            upload.fill()  # what it raises goes on when the other thread, too, has left the device
        built.result()

    def _build(self) -> None:
        """Kernels, compiled, and their bindings, for the device's settings."""
        b = self._buffers
        self._spare: list[Readback] = []
        tuning = self._device.tuning
        self._prefill, self._decode = (
            Program(self._device, self.config, self._weights, b, tokens=tile, f16_cache=self._f16)
            for tile in (tuning.prefill_tokens, 1)
        )
        self._wide = self._prefill
        if tuning.tiles:
            self._wide = Program(
                self._device, self.config, self._weights, b, tokens=tuning.tiles.tokens, f16_cache=self._f16
            )
        rounds = any(site.dispatch.kernel.name == "tile_bytes" for site in self._wide.body)
        self._compute_dtype = "int15" if rounds else "float32"  # parity's word; 16 bits are within it
        self._sample = {
            sampled: kernels.sample_site(
                self._device,
                self._choice,
                b.step,
                b["logits"],
                b["seen"],
                b["tokens"],
                b["emitted"],
                sampled=sampled,
            )
            for sampled in (False, True)
        }
        self._device.finish_kernels()  # no prompt waits for one

    def _prefill_of(self, tokens: int) -> Program:
        """The kernels that suit a chunk of so many tokens."""
        tiles = self._device.tuning.tiles
        return self._wide if tiles and tokens >= tiles.from_tokens else self._prefill

    def retune(self, tuning: Tuning, *, subgroups: bool) -> None:
        """Uses other settings of the matrix kernels on the loaded weights; buffers keep their sizes."""
        with self._lock:
            self._begin()
            self._device.tuning, self._device.subgroups = tuning, subgroups
            self._build()

    def close(self) -> None:
        """Frees the device's memory; streams that are open end with ModelClosedError."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            self._request += 1
            if self._owns_device:
                self._device.close()
            for name in (
                "_weights",
                "_buffers",
                "_prefill",
                "_wide",
                "_decode",
                "_sample",
                "_choice",
                "_spare",
            ):
                self.__dict__.pop(name, None)
            for batches in list(self._streams):
                batches.drop()
        gc.collect()  # wgpu's devices and queues name each other

    def __enter__(self) -> "WgpuRunner":
        check_open(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def cache_nbytes(self) -> int:
        return self.plan.cache

    def describe(self) -> dict[str, object]:
        report = self._device.report
        return {
            "backend": self.name,
            "device": report.summary,
            "software": report.software,
            "driver": report.driver,
            "compute_dtype": self._compute_dtype,
            "cache_dtype": "float16" if self._f16 else "float32",
            "implementations": dict.fromkeys(self._types, "wgsl"),
            "fallbacks": [],
            "batch_invariant": True,  # one sequence at a time
            "memory": str(self.plan),
        }

    def forward(self, token_ids: TokenIds, **options: Unpack[ForwardOptions]) -> Forward:
        """As ``Runner.forward``."""
        r = checked_forward(self, token_ids, **options)
        tokens = r.token_ids.astype(np.uint32)
        replay = None if r.expert_ids is None else r.expert_ids.astype(np.uint32)
        chunk = max(r.chunk_sizes, default=len(tokens))
        with self._lock:
            self._begin()
            chunks = self._chunks(len(tokens), chunk)
            one_by_one = max(r.chunk_sizes, default=0) == 1
            program = self._decode if one_by_one else self._prefill_of(chunks[0][1])
            body = program.body if r.is_whole else program.body_of(r.layers)
            way = _Way(program, body, r.layers)
            parts = [
                self._forward_chunk(way, tokens[start:end], start, r.capture, replay) for start, end in chunks
            ]
        logits = np.concatenate([p.logits for p in parts])
        stages = {key: np.concatenate([p.stages[key] for p in parts]) for key in parts[0].stages}
        return Forward(logits, np.concatenate([p.expert_ids for p in parts], axis=1), stages)

    def log_likelihoods(self, token_ids: TokenIds, *, first: int = 1) -> np.ndarray:
        tokens = checked_text(self, token_ids, first).astype(np.uint32)
        count = len(tokens) - 1
        with self._lock:
            self._begin()
            found = [np.empty(0)]
            chunks = self._chunks(count, count)
            program = self._prefill_of(chunks[0][1]) if chunks else self._prefill
            for start, end in chunks:
                self._device.write(self._buffers["tokens"], tokens[start:end])
                self._write_step(start, end - start, 0)
                self._device.run(program.launches(program.body, start, end - start))
                wanted = max(start, first - 1)
                if wanted < end:
                    logits = self._logits(program, start, end - start, wanted - start)
                    found.append(target_log_likelihoods(logits, tokens[wanted + 1 : end + 1]))
        return np.concatenate(found)

    def stream(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        reuse: bool = False,
        lookup: PromptLookup | None = None,
    ) -> Generator[int]:
        """As ``Runner.stream``. A newer request on this runner ends this one with a RuntimeError."""
        tokens = checked_prompt(self, token_ids, lookup).astype(np.uint32)
        maximum = min(max_tokens, self.max_context - len(tokens))
        return self._tokens(tokens, maximum, sampling, frozenset(stop_ids))

    def _tokens(
        self, tokens: np.ndarray, maximum: int, sampling: Sampling, stop_ids: frozenset[int]
    ) -> Generator[int]:
        if maximum <= 0:
            return
        with self._lock:
            request = self._begin()
            batches = _Batches(self, len(tokens), maximum, sampling)
            self._streams.add(batches)
            self._start(tokens, sampling)
            batches.submit(1, self._prompt_launches(tokens, sampling))
        emitted = 0
        while emitted < maximum:
            with self._lock:
                check_open(self)
                if request != self._request:
                    raise RuntimeError(
                        "a newer request has started on this wgpu runner: this stream has ended"
                    )
                batches.fill()
                chosen = batches.wait()
            for token in chosen:
                if token == NONFINITE:
                    raise NumericalError(
                        f"the wgpu backend's logits are not finite at position {len(tokens) + emitted - 1}: "
                        "run `qwen3-moe trace` to find the first stage that is not"
                    )
                if token in stop_ids:
                    return
                yield token
                emitted += 1

    def _begin(self) -> int:
        """The number of a new request."""
        check_open(self)
        self._request += 1
        return self._request

    def _chunks(self, num_tokens: int, longest: int) -> list[tuple[int, int]]:
        chunk = min(longest, self._buffers.workspace.chunk)
        return [(start, min(start + chunk, num_tokens)) for start in range(0, num_tokens, chunk)]

    def _write_step(self, *words: int, replay: bool = False, record: bool = False) -> None:
        self._device.write(self._buffers.step, step_words(*words, replay=replay, record=record))

    def _forward_chunk(
        self,
        way: "_Way",
        tokens: np.ndarray,
        position: int,
        capture: frozenset[str],
        replay: np.ndarray | None,
    ) -> Forward:
        device, buffers = self._device, self._buffers
        count = len(tokens)
        device.write(buffers["tokens"], tokens)
        if replay is not None:
            for layer, ids in zip(way.layers, replay[:, position : position + count], strict=True):
                device.write(buffers["replay"], ids, buffers.layer_offset(layer))
        self._write_step(position, count, 0, replay=replay is not None, record=bool(capture))
        stages: dict[StageKey, np.ndarray] = {}
        if capture:
            for site in way.body:
                device.run(way.program.launches([site], position, count))
                for tap in site.taps:
                    if tap.key[0] in capture:
                        stages[tap.key] = tap.read(device, count)
        else:
            device.run(way.program.launches(way.body, position, count))
        logits = self._logits(way.program, position, count)
        if "result_output" in capture:
            stages["result_output", None] = logits
        return Forward(logits, self._expert_ids(way.layers, count), stages)

    def _logits(self, program: Program, position: int, count: int, skip: int = 0) -> np.ndarray:
        """Logits [count - skip, V] of the last tokens whose normed states are there, a few rows at a time."""
        logits = np.empty((count - skip, self.config.vocab_size), np.float32)
        rows = self._buffers.workspace.logit_rows
        for first in range(skip, count, rows):
            part = logits[first - skip : first - skip + rows]
            self._write_step(position, count, first)
            self._device.run(program.launches(program.head, position, count, len(part)))
            part[:] = self._device.read(self._buffers["logits"], np.float32, part.size).reshape(part.shape)
        return logits

    def _expert_ids(self, layers: Sequence[int], count: int) -> np.ndarray:
        buffers, chosen = self._buffers, self.config.num_experts_per_tok
        stride = buffers.layer_offset(1) // 4
        ids = self._device.read(buffers["ids"], np.int32, stride * self.config.num_hidden_layers)
        used = ids.reshape(-1, stride)[list(layers), : count * chosen]
        return used.reshape(len(layers), count, chosen)

    def _start(self, tokens: np.ndarray, sampling: Sampling) -> None:
        """Sampling parameters and the prompt's tokens on the device."""
        self._device.write(self._choice, sampling_words(sampling, self.config.vocab_size))
        seen = np.zeros(self.config.vocab_size, np.uint32)
        seen[tokens] = 1
        self._device.write(self._buffers["seen"], seen)

    def _prompt_launches(self, tokens: np.ndarray, sampling: Sampling) -> list[Launch]:
        """Runs all chunks of the prompt but the last; the launches of that one and of the first choice."""
        chunks = self._chunks(len(tokens), len(tokens))
        program = self._prefill_of(chunks[0][1])
        for start, end in chunks:
            self._device.write(self._buffers["tokens"], tokens[start:end])
            self._write_step(start, end - start, end - start - 1)
            launches = program.launches(program.body, start, end - start)
            if end < len(tokens):
                self._device.run(launches)
        head = self._decode.launches(self._decode.head, 0, 1)
        return [*launches, *head, self._choice_launch(sampling)]

    def _choice_launch(self, sampling: Sampling) -> Launch:
        return self._sample[sampling.temperature > 0].dispatch, 1, 1, 1

    def _decode_launches(self, position: int, sampling: Sampling) -> list[Launch]:
        """One token at ``position``, and the choice of the next."""
        return [*self._decode.decode_launches(position), self._choice_launch(sampling)]


@dataclass(frozen=True, eq=False)
class _Way:
    """How a forward pass runs: by which kernels, and through which layers."""

    program: Program
    body: list[Site]
    layers: tuple[int, ...]


class _Batches:
    """Batches of tokens on their way: encoded, submitted, and read back in order."""

    def __init__(self, runner: WgpuRunner, num_prompt: int, maximum: int, sampling: Sampling):
        self._runner = runner
        self._device = runner._device
        self._sampling = sampling
        self._position = num_prompt
        self._left = maximum
        self._size = 1
        self._waiting: deque[tuple[Readback, int]] = deque()

    def drop(self) -> None:
        """Forgets what is in flight: its buffers are gone."""
        self._waiting.clear()

    def submit(self, count: int, launches: list[Launch]) -> None:
        """Queues launches that choose ``count`` tokens."""
        emitted, nbytes = self._runner._buffers["emitted"], 4 * self._device.tuning.tokens_per_submit
        spare = self._runner._spare
        readback = spare.pop() if spare else self._device.readback(emitted, nbytes)
        self._device.run(launches, readback)
        self._waiting.append((readback, count))
        self._left -= count

    def fill(self) -> None:
        """Queues batches, each twice as long as the last, until enough are in flight."""
        tuning = self._device.tuning
        while self._left > 0 and len(self._waiting) < max(1, tuning.submits_in_flight):
            count = min(self._size, self._left)
            launches: list[Launch] = []
            for i in range(count):
                launches += self._runner._decode_launches(self._position + i, self._sampling)
            self._device.write(self._runner._buffers.step, np.zeros(1, np.uint32), 4 * EMITTED_WORD)
            self.submit(count, launches)
            self._position += count
            self._size = min(2 * self._size, tuning.tokens_per_submit)

    def wait(self) -> list[int]:
        """The tokens of the oldest batch, when they are there."""
        readback, count = self._waiting.popleft()
        tokens = readback.wait().view(np.uint32)[:count].tolist()
        self._runner._spare.append(readback)
        return tokens

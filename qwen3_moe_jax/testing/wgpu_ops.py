"""Single kernels on NumPy arrays, for tests and for looking at one op alone.

Outputs start as NaN with a guard of NaN behind them: a kernel that leaves a
value out returns NaN, and one that writes past its output is an error.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.packed import PackedTensor
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.wgpu_backend import kernels, tiles
from qwen3_moe_jax.wgpu_backend.buffers import sampling_words, step_words
from qwen3_moe_jax.wgpu_backend.device import Device
from qwen3_moe_jax.wgpu_backend.kernels import DenseBuffer, ExpertBuffer, Segment
from qwen3_moe_jax.wgpu_backend.layout import device_nbytes, granule, items_per_window
from qwen3_moe_jax.wgpu_backend.runner import NONFINITE
from qwen3_moe_jax.wgpu_backend.sites import Shape, Site, max_tiles
from qwen3_moe_jax.wgpu_backend.weights import write_rows

GUARD_WORDS = 1024
_POISON = 0x7FC0BEEF  # a quiet NaN that no arithmetic makes


class Ops:
    """The kernels of one device. ``decode`` runs the kernels for a single token, token by token."""

    def __init__(self, device: Device):
        self.device = device
        self._step = device.buffer(4 * len(step_words()), "step", uniform=True)
        self._outputs: list[tuple[Any, int]] = []

    def _set_step(
        self, tokens: int, *, position: int = 0, replay: bool = False, record: bool = False
    ) -> None:
        self.device.write(self._step, step_words(position, tokens, replay=replay, record=record))

    def _in(self, array: np.ndarray, dtype: Any = np.float32) -> Any:
        return self.device.upload(np.ascontiguousarray(array, dtype), "input")

    def _out(self, count: int) -> Any:
        poison = np.full(count + GUARD_WORDS, _POISON, np.uint32)
        buffer = self.device.upload(poison, "output")
        self._outputs.append((buffer, count))
        return buffer

    def _get(self, buffer: Any, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        return self.device.read(buffer, dtype, int(np.prod(shape))).reshape(shape)

    def _run(self, sites: list[Site], shape: Shape, tokens: int, position: int = 0, repeats: int = 1) -> None:
        launches = [shape.launch(site, position, tokens, tokens) for site in sites]
        self.device.run([launch for launch in launches if launch] * repeats)
        for buffer, count in self._outputs:
            guard = self.device.read(buffer, np.uint32, GUARD_WORDS, 4 * count)
            if (guard != _POISON).any():
                raise RuntimeError(
                    f"{sites[0].dispatch.kernel.name} wrote past the end of an output of {count} words"
                )
        self._outputs.clear()

    def _weights(self, weight: PackedTensor) -> Any:
        buffer = self.device.buffer(device_nbytes(weight.type, int(np.prod(weight.shape))), "weights")
        write_rows(self.device, buffer, weight, 0)
        return buffer

    def _tile(self, decode: bool, wide: bool) -> int:
        tiles = self.device.tuning.tiles
        return 1 if decode else tiles.tokens if wide and tiles else self.device.tuning.prefill_tokens

    def matmul(
        self, x: np.ndarray, *weights: PackedTensor, decode: bool = False, wide: bool = False
    ) -> np.ndarray:
        """x [T, K] times the transposes of up to three [N, K], side by side in one buffer: [T, sum of N].

        ``wide`` takes the kernel of long prompts.
        """
        tokens, columns = x.shape
        sizes = [device_nbytes(w.type, int(np.prod(w.shape))) for w in weights]
        buffer = self.device.buffer(sum(sizes), "weights")
        segments, at, rows = [], 0, 0
        for weight, size in zip(weights, sizes, strict=True):
            write_rows(self.device, buffer, weight, at)
            segments.append(Segment(weight.type, weight.shape[0], columns, at // 16, rows))
            at += size
            rows += weight.shape[0]
        dense = DenseBuffer(buffer, tuple(segments))
        if decode and tokens > 1:
            return np.concatenate([self.matmul(row[None], *weights, decode=True) for row in x])
        y = self._out(tokens * rows)
        self._set_step(tokens)
        tile, inputs = self._tile(decode, wide), self._in(x)
        name, _ = tiles.dense_kernel(self.device.tuning.tiles, segments, wide=wide)
        sites, rounded = self._rounding(name, inputs, columns, tokens)
        site = kernels.dense_site(
            self.device, dense, inputs, y, self._step, tokens=tile, y_stride=rows, rounded=rounded
        )
        self._run([*sites, site], self._shape(1, 1), tokens)
        return self._get(y, tokens, rows)

    def _rounding(self, name: str, x: Any, values: int, tokens: int) -> tuple[list[Site], Any]:
        """What rounds x, ``values`` of each token, for the kernel of this name, and where to."""
        if name != "tile_bytes":
            return [], None
        rounded = self._out(tiles.rounded_nbytes(tokens * values) // 4)
        return [tiles.rounding_site(self.device, x, rounded, self._step, values)], rounded

    def _shape(self, experts: int, chosen: int) -> Shape:
        return Shape(experts, chosen)

    def expert_matmul(
        self,
        x: np.ndarray,
        expert_ids: np.ndarray,
        *weights: PackedTensor,
        decode: bool = False,
        wide: bool = False,
    ) -> np.ndarray:
        """x [T, K] or [T, X, K] times the chosen experts of [E, N, K]: [T, X, N].

        Two stacks are gate and up: the result is ``silu(gate x) * (up x)``.
        """
        tokens, chosen = expert_ids.shape
        if decode and tokens > 1:
            return np.concatenate(
                [
                    self.expert_matmul(x[t : t + 1], expert_ids[t : t + 1], *weights, decode=True)
                    for t in range(tokens)
                ]
            )
        experts, rows, _ = weights[0].shape
        x_div = chosen if x.ndim == 2 else 1
        y = self._out(tokens * chosen * rows)
        self._set_step(tokens)
        windows = list(zip(*(self._stack_windows(w, weights) for w in weights), strict=True))
        tile, shape = self._tile(decode, wide), self._shape(experts, chosen)
        if wide:
            tile = tiles.expert_tile(self.device.tuning, windows[:1])
        routing = {
            "ids": self._in(expert_ids, np.uint32),
            "tiles": self._out(4 * (1 + max_tiles(expert_ids.size, experts, tile))),
            "order": self._out(expert_ids.size),
        }
        inputs = self._in(x)
        sites = []
        if not decode:
            sites.append(
                kernels.group_site(
                    self.device,
                    self._step,
                    routing["ids"],
                    routing["tiles"],
                    routing["order"],
                    experts=experts,
                    chosen=chosen,
                    tokens=tile,
                )
            )
        name, _ = tiles.expert_kernel(self.device.tuning.tiles, windows[0], tile)
        rounding, rounded = self._rounding(name, inputs, x.size // tokens, tokens)
        sites += rounding
        for stacks in windows:
            sites.append(
                kernels.expert_site(
                    self.device,
                    stacks,
                    inputs,
                    y,
                    self._step,
                    routing,
                    tokens=tile,
                    x_div=x_div,
                    rounded=rounded,
                )
            )
        self._run(sites, shape, tokens)
        return self._get(y, tokens, chosen, rows)

    def _stack_windows(
        self, weight: PackedTensor, all_weights: tuple[PackedTensor, ...]
    ) -> list[ExpertBuffer]:
        experts, rows, columns = weight.shape
        step = max(granule(w.type, rows * columns) for w in all_weights)
        count = min(
            items_per_window(w.type, experts, rows * columns, self.device.max_bytes, experts, step)
            for w in all_weights
        )
        return [
            ExpertBuffer(
                self._weights(weight[b : b + count]), weight.type, b, min(b + count, experts), rows, columns
            )
            for b in range(0, experts, count)
        ]

    def choose_experts(
        self, logits: np.ndarray, chosen: int, forced_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Softmax over logits [T, E], the ``chosen`` most probable, their weights: probs, ids, weights."""
        tokens, experts = logits.shape
        probs, ids, weights = self._out(logits.size), self._out(tokens * chosen), self._out(tokens * chosen)
        replay = self._in(np.zeros((tokens, chosen)) if forced_ids is None else forced_ids, np.uint32)
        self._set_step(tokens, replay=forced_ids is not None)
        site = kernels.router_site(
            self.device,
            self._step,
            self._in(logits),
            probs,
            ids,
            weights,
            replay,
            experts=experts,
            chosen=chosen,
        )
        self._run([site], self._shape(experts, chosen), tokens)
        return (
            self._get(probs, tokens, experts),
            self._get(ids, tokens, chosen, dtype=np.int32),
            self._get(weights, tokens, chosen),
        )

    def norm(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        eps: float,
        deltas: np.ndarray | None = None,
        delta_weights: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """x [T, D] plus the weighted sum of deltas [T, n, D], and its RMSNorm."""
        tokens, width = x.shape
        count = 0 if deltas is None else deltas.shape[1]
        residual, h, sums = self._in(x), self._out(x.size), self._out(x.size)
        self._set_step(tokens)
        site = kernels.norm_site(
            self.device,
            self._step,
            residual,
            self._in(np.zeros(4) if deltas is None else deltas),
            self._in(np.zeros(4) if delta_weights is None else delta_weights),
            self._in(weight),
            h,
            sums,
            deltas=count,
            weighted=delta_weights is not None,
            width=width,
            eps=eps,
        )
        self._run([site], self._shape(1, 1), tokens)
        return self._get(residual, tokens, width), self._get(h, tokens, width)

    def embed(self, table: PackedTensor, token_ids: np.ndarray) -> np.ndarray:
        """Dequantized rows of a table [V, D]."""
        rows, columns = table.shape
        x = self._out(len(token_ids) * columns)
        count = items_per_window(table.type, rows, columns, self.device.max_bytes, rows)
        ids = self._in(token_ids, np.uint32)
        sites = [
            kernels.embed_site(
                self.device,
                ExpertBuffer(
                    self._weights(table[b : b + count]), table.type, b, min(b + count, rows), 1, columns
                ),
                ids,
                x,
            )
            for b in range(0, rows, count)
        ]
        self._run(sites, self._shape(1, 1), len(token_ids))
        return self._get(x, len(token_ids), columns)

    def attention(
        self,
        qkv: np.ndarray,
        norms: np.ndarray,
        rope: tuple[np.ndarray, np.ndarray],
        heads: int,
        *,
        eps: float = 1e-6,
        chunk: int | None = None,
        span: int | None = None,
        f16: bool = False,
        together: int = 1,
    ) -> np.ndarray:
        """Head norms, RoPE, cache and causal attention of a prompt from position 0.

        Args:
          qkv: [T, N + 2 K, H].
          norms: [2, H], of q and k.
          rope: cos and sin [T or more, H / 2].
          heads: N.
          chunk: tokens per pass; 1 is decoding.
          span: cache positions a workgroup.
          together: tokens a workgroup.
        """
        tokens, all_heads, head_dim = qkv.shape
        kv_heads = (all_heads - heads) // 2
        capacity = len(rope[0])
        span = span or self.device.tuning.prefill_span
        cache = (2 if f16 else 4) * kv_heads * capacity * head_dim
        keys, values = (self.device.buffer(cache, n) for n in ("keys", "values"))
        table, norm = self._in(np.concatenate(rope, axis=1)), self._in(norms)
        out, step = [], chunk or tokens
        for start in range(0, tokens, step):
            part = qkv[start : start + step]
            count = len(part)
            spans = -(-(start + count) // span)
            roped = self._out(count * (heads + kv_heads) * head_dim)
            output = self._out(count * heads * head_dim)
            parts = self._out(count * spans * heads * (head_dim + 4))
            shape: dict[str, Any] = dict(
                heads=heads, kv_heads=kv_heads, head_dim=head_dim, capacity=capacity, f16=f16
            )
            sites = [
                kernels.rope_site(
                    self.device,
                    self._step,
                    {2: self._in(part), 3: norm, 4: table, 5: roped, 6: keys, 7: values},
                    eps=eps,
                    **shape,
                ),
                *kernels.attention_sites(
                    self.device,
                    self._step,
                    roped,
                    keys,
                    values,
                    output,
                    parts,
                    span=span,
                    tokens=together,
                    **shape,
                ),
            ]
            self._set_step(count, position=start)
            self._run(sites, self._shape(1, 1), count, start)
            out.append(self._get(output, count, heads, head_dim))
        return np.concatenate(out)

    def sample(
        self, logits: np.ndarray, sampling: Sampling, count: int = 1, *, seen: Mapping[int, int] | None = None
    ) -> np.ndarray:
        """``count`` choices from logits [V], one position after the other; NumericalError's mark becomes -1.

        Args:
          seen: flags of tokens: 1 in prompt or output, 2 in output.
        """
        vocabulary = logits.size
        flags = np.zeros(vocabulary, np.uint32)
        for token, flag in (seen or {}).items():
            flags[token] = flag
        choice = self.device.uniform(*sampling_words(sampling, vocabulary).tolist())
        emitted = self._out(count)
        self._set_step(1)
        site = kernels.sample_site(
            self.device,
            choice,
            self._step,
            self._in(logits),
            self._in(flags, np.uint32),
            self._in(np.zeros(4), np.uint32),
            emitted,
            sampled=sampling.temperature > 0,
        )
        self._run([site], self._shape(1, 1), 1, repeats=count)
        tokens = self._get(emitted, count, dtype=np.uint32)
        return np.where(tokens == NONFINITE, -1, tokens.astype(np.int64))

"""The dispatches of one forward pass, for a tile of tokens (prefill) and for one token (decode).

Ten dispatches per layer for a token: q, k and v; head norms, RoPE and cache
write; attention; o_proj; residual and norm; router; choice of experts; gate, up
and SwiGLU; down; weighted sum, residual and the next norm. Prefill adds the
grouping of tokens by expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.rope import rope_tables
from qwen3_moe_jax.core.stages import StageKey
from qwen3_moe_jax.wgpu_backend import kernels
from qwen3_moe_jax.wgpu_backend.device import Device, Launch
from qwen3_moe_jax.wgpu_backend.kernels import Shape, Site
from qwen3_moe_jax.wgpu_backend.plan import Workspace
from qwen3_moe_jax.wgpu_backend.weights import LayerBuffers, ModelWeights

EMITTED_WORD = 4
"""Index of ``emitted`` in ``Step`` of common.wgsl."""

OFFSET_ALIGNMENT = 256
"""What every adapter accepts as the offset of a binding."""


def step_words(
    position: int = 0, tokens: int = 1, head_row: int = 0, *, replay: bool = False, record: bool = False
) -> np.ndarray:
    """``Step`` of common.wgsl before a pass: uint32 [8], padded."""
    return np.asarray([position, tokens, head_row, replay, 0, record, 0, 0], np.uint32)


@dataclass(frozen=True, eq=False)
class Tap:
    """Where a stage can be read: floats ``[T, *shape]`` at an offset of a buffer, then a part of them."""

    key: StageKey
    buffer: Any
    shape: tuple[int, ...]
    part: slice | None = None
    dtype: Any = np.float32
    offset: int = 0

    def read(self, device: Device, tokens: int) -> np.ndarray:
        count = tokens * int(np.prod(self.shape))
        whole = device.read(self.buffer, self.dtype, count, self.offset).reshape(tokens, *self.shape)
        return whole if self.part is None else np.ascontiguousarray(whole[:, self.part])


class Buffers:
    """The work space on the device, by name; ``keys`` and ``values`` are lists, one per layer."""

    def __init__(self, device: Device, config: Qwen3MoeConfig, workspace: Workspace, max_context: int):
        self.workspace = workspace
        layers = config.num_hidden_layers
        self._layer_ids = (
            -(-4 * workspace.chunk * config.num_experts_per_tok // OFFSET_ALIGNMENT) * OFFSET_ALIGNMENT
        )
        sizes = dict(workspace.nbytes)
        sizes["ids"] = sizes["replay"] = self._layer_ids * layers
        key_bytes, value_bytes = sizes.pop("keys"), sizes.pop("values")
        sizes["emitted"] = 4 * device.tuning.tokens_per_submit
        self.named = {name: device.buffer(size, name) for name, size in sizes.items()}
        self.keys = [device.buffer(key_bytes, f"keys of layer {i}") for i in range(layers)]
        self.values = [device.buffer(value_bytes, f"values of layer {i}") for i in range(layers)]
        self.step = device.buffer(step_words().nbytes, "step", uniform=True)
        cos, sin = rope_tables(config, max_context)
        device.write(self.named["rope_table"], np.concatenate([cos, sin], axis=1))

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def of_layer(self, name: str, layer: int) -> tuple[Any, int, int]:
        """The part of "ids" or "replay" that is one layer's."""
        return self.named[name], layer * self._layer_ids, self._layer_ids

    def layer_offset(self, layer: int) -> int:
        """Where a layer's part of "ids" or "replay" starts, in bytes."""
        return layer * self._layer_ids


class Program:
    """The sites of a pass.

    Attributes:
      body: embedding to the last norm.
      head: logits, for the rows from the step's head_row.
    """

    def __init__(
        self,
        device: Device,
        config: Qwen3MoeConfig,
        weights: ModelWeights,
        buffers: Buffers,
        *,
        tokens: int,
        f16_cache: bool,
    ):
        """Args: tokens, a tile: 1 for decode."""
        self._device = device
        self._config = config
        self._buffers = buffers
        self._tokens = tokens
        self._f16 = f16_cache
        self.shape = Shape(device.tuning.prefill_tokens, config.num_experts, config.num_experts_per_tok)
        tuning = device.tuning
        self._span = tuning.decode_span if tokens == 1 else tuning.prefill_span
        self._decode_launches: dict[int, list[Launch]] = {}
        self._weights = weights
        self.body = self.body_of(range(config.num_hidden_layers))
        self.head = [
            kernels.dense_site(
                device,
                w,
                buffers["h"],
                buffers["logits"],
                buffers.step,
                tokens=tokens,
                y_stride=config.vocab_size,
                head=True,
            )
            for w in weights.lm_head
        ]

    def launches(self, sites: list[Site], position: int, tokens: int, head_rows: int = 1) -> list[Launch]:
        """The grids of a pass over ``tokens`` tokens from ``position``."""
        found = (self.shape.launch(site, position, tokens, head_rows) for site in sites)
        return [launch for launch in found if launch is not None]

    def decode_launches(self, position: int) -> list[Launch]:
        """Body and head for one token; kept, because only the number of spans changes from token to token."""
        spans = position // self._span
        if spans not in self._decode_launches:
            self._decode_launches[spans] = self.launches([*self.body, *self.head], position, 1)
        return self._decode_launches[spans]

    def body_of(self, layers: Sequence[int]) -> list[Site]:
        """The sites of these layers, one after the other, between the embedding and the last norm."""
        return list(self._body(self._weights, layers))

    def _body(self, weights: ModelWeights, layers: Sequence[int]) -> Iterator[Site]:
        b, width = self._buffers, self._config.hidden_size
        for window in weights.embed_tokens:
            yield kernels.embed_site(self._device, window, b["tokens"], b["x"])
        norms: list[tuple[Any, StageKey]] = [
            (weights.layers[i].input_layernorm, ("attn_norm", i)) for i in layers
        ]
        norms.append((weights.norm, ("result_norm", None)))
        norm, key = norms[0]
        taps = (Tap(("inp_embd", None), b["x"], (width,)), Tap(key, b["h"], (width,)))
        yield self._norm(b["attn_out"], norm, 0, taps)
        for i, (norm, key) in zip(layers, norms[1:], strict=True):
            yield from self._attention(i, weights.layers[i])
            yield from self._experts(i, weights.layers[i])
            taps = (
                Tap(("ffn_moe_out", i), b["sums"], (width,)),
                Tap(("l_out", i), b["x"], (width,)),
                Tap(key, b["h"], (width,)),
            )
            yield self._norm(b["down"], norm, self._config.num_experts_per_tok, taps)

    def _norm(self, delta: Any, norm: Any, deltas: int, taps: tuple[Tap, ...]) -> Site:
        b, c = self._buffers, self._config
        return kernels.norm_site(
            self._device,
            b.step,
            b["x"],
            delta,
            b["expert_weights"],
            norm,
            b["h"],
            b["sums"],
            deltas=deltas,
            weighted=deltas > 1 or delta is b["down"],
            width=c.hidden_size,
            eps=c.rms_norm_eps,
            taps=taps,
        )

    def _dense(
        self, weights: list, x: Any, y: Any, y_stride: int, taps: tuple[Tap, ...] = ()
    ) -> Iterator[Site]:
        for i, buffer in enumerate(weights):
            yield kernels.dense_site(
                self._device,
                buffer,
                x,
                y,
                self._buffers.step,
                tokens=self._tokens,
                y_stride=y_stride,
                taps=taps if i + 1 == len(weights) else (),
            )

    def _attention(self, i: int, layer: LayerBuffers) -> Iterator[Site]:
        b, c = self._buffers, self._config
        heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv = (heads + 2 * kv_heads, head_dim)
        q, k, v = slice(heads), slice(heads, heads + kv_heads), slice(heads + kv_heads, None)
        yield from self._dense(
            layer.qkv,
            b["h"],
            b["qkv"],
            qkv[0] * head_dim,
            tuple(Tap((f"{n}cur", i), b["qkv"], qkv, p) for n, p in (("Q", q), ("K", k), ("V", v))),
        )
        both = (heads + kv_heads, head_dim)
        yield kernels.rope_site(
            self._device,
            b.step,
            {
                2: b["qkv"],
                3: layer.head_norms,
                4: b["rope_table"],
                5: b["roped"],
                6: b.keys[i],
                7: b.values[i],
            },
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            capacity=self._capacity,
            eps=c.rms_norm_eps,
            f16=self._f16,
            taps=(
                Tap(("Qcur_normed", i), b["qkv"], qkv, q),
                Tap(("Kcur_normed", i), b["qkv"], qkv, k),
                Tap(("Qcur_rope", i), b["roped"], both, q),
                Tap(("Kcur_rope", i), b["roped"], both, k),
            ),
        )
        yield from kernels.attention_sites(
            self._device,
            b.step,
            b["roped"],
            b.keys[i],
            b.values[i],
            b["attended"],
            b["parts"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            capacity=self._capacity,
            span=self._span,
            f16=self._f16,
            taps=(Tap(("kqv_out", i), b["attended"], (heads, head_dim)),),
        )
        width = c.hidden_size
        yield from self._dense(
            layer.o_proj,
            b["attended"],
            b["attn_out"],
            width,
            (Tap(("attn_out", i), b["attn_out"], (width,)),),
        )
        yield self._norm(
            b["attn_out"],
            layer.post_attention_layernorm,
            1,
            (Tap(("ffn_inp", i), b["x"], (width,)), Tap(("ffn_norm", i), b["h"], (width,))),
        )

    @property
    def _capacity(self) -> int:
        return self._buffers.workspace.nbytes["rope_table"] // (4 * self._config.head_dim)

    def _experts(self, i: int, layer: LayerBuffers) -> Iterator[Site]:
        b, c = self._buffers, self._config
        experts, chosen, width, inner = (
            c.num_experts,
            c.num_experts_per_tok,
            c.hidden_size,
            c.moe_intermediate_size,
        )
        yield from self._dense(
            layer.router,
            b["h"],
            b["router_logits"],
            experts,
            (Tap(("ffn_moe_logits", i), b["router_logits"], (experts,)),),
        )
        yield kernels.router_site(
            self._device,
            b.step,
            b["router_logits"],
            b["probs"],
            b.of_layer("ids", i),
            b["expert_weights"],
            b.of_layer("replay", i),
            experts=experts,
            chosen=chosen,
            taps=(
                Tap(("ffn_moe_probs", i), b["probs"], (experts,)),
                Tap(("ffn_moe_topk", i), b["ids"], (chosen,), dtype=np.int32, offset=b.layer_offset(i)),
                Tap(("ffn_moe_weights_norm", i), b["expert_weights"], (chosen,)),
            ),
        )
        routing = {"ids": b.of_layer("ids", i), "tiles": b["tiles"], "order": b["order"]}
        if self._tokens > 1:
            yield kernels.group_site(
                self._device,
                b.step,
                routing["ids"],
                b["tiles"],
                b["order"],
                experts=experts,
                chosen=chosen,
                tokens=self._tokens,
            )
        plane = b.workspace.nbytes["act"] // 12
        gated = tuple(
            Tap((name, i), b["act"], (chosen, inner), offset=4 * plane * at)
            for at, name in enumerate(("ffn_moe_swiglu", "ffn_moe_gate", "ffn_moe_up"))
        )
        for n, pair in enumerate(layer.gate_up):
            yield kernels.expert_site(
                self._device,
                pair,
                b["h"],
                b["act"],
                b.step,
                routing,
                tokens=self._tokens,
                x_div=chosen,
                plane=plane,
                taps=gated if n + 1 == len(layer.gate_up) else (),
            )
        down = (Tap(("ffn_moe_down", i), b["down"], (chosen, width)),)
        for n, stack in enumerate(layer.down):
            yield kernels.expert_site(
                self._device,
                [stack],
                b["act"],
                b["down"],
                b.step,
                routing,
                tokens=self._tokens,
                x_div=1,
                taps=down if n + 1 == len(layer.down) else (),
            )

"""The dispatches of one forward pass, for a tile of tokens (prefill) and for one token (decode).

Ten dispatches per layer for a token: q, k and v; head norms, RoPE and cache
write; attention; o_proj; residual and norm; router; choice of experts; gate, up
and SwiGLU; down; weighted sum, residual and the next norm. Prefill adds the
grouping of tokens by expert.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.stages import StageKey
from qwen3_moe_jax.wgpu_backend import kernels, tiles, vectors
from qwen3_moe_jax.wgpu_backend.buffers import Buffers, Tap
from qwen3_moe_jax.wgpu_backend.device import Device, Launch
from qwen3_moe_jax.wgpu_backend.kernels import DenseBuffer, ExpertBuffer
from qwen3_moe_jax.wgpu_backend.sites import Shape, Site
from qwen3_moe_jax.wgpu_backend.weights import LayerBuffers, ModelWeights


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
        """Args: tokens, a tile: 1 for decode, the tuning's prefill_tokens or its wide tiles' for prompts."""
        self._device = device
        self._config = config
        self._buffers = buffers
        self._tokens = tokens
        self._f16 = f16_cache
        self.shape = Shape(config.num_experts, config.num_experts_per_tok)
        tuning = device.tuning
        self._span = tuning.decode_span if tokens == 1 else tuning.prefill_span
        self._decode_launches: dict[int, list[Launch]] = {}
        self._weights = weights
        self._joins = tokens == 1 and vectors.suits(device, config, weights.layers)
        self.body = self.body_of(range(config.num_hidden_layers))
        self.head = list(
            self._dense(weights.lm_head, buffers["h"], buffers["logits"], config.vocab_size, head=True)
        )

    def launches(self, sites: list[Site], position: int, tokens: int, head_rows: int = 1) -> list[Launch]:
        """The grids of a pass over ``tokens`` tokens from ``position``."""
        found = (self.shape.launch(site, position, tokens, head_rows) for site in sites)
        return [launch for launch in found if launch is not None]

    def decode_launches(self, position: int) -> list[Launch]:
        """Body and head for one token; kept, because only the number of spans changes from token to token."""
        spans = position // self._span
        if self._device.tuning.vectors:
            spans = position // self._device.tuning.vectors.tile
        if spans not in self._decode_launches:
            self._decode_launches[spans] = self.launches([*self.body, *self.head], position, 1)
        return self._decode_launches[spans]

    def body_of(self, layers: Sequence[int]) -> list[Site]:
        """The sites of these layers, one after the other, between the embedding and the last norm."""
        return list(self._joined(layers) if self._joins else self._body(self._weights, layers))

    def _joined(self, layers: Sequence[int]) -> Iterator[Site]:
        """The body by the kernels of one token."""
        b, c, w = self._buffers, self._config, self._weights
        width = c.hidden_size
        for n, window in enumerate(w.embed_tokens, 1):
            last = n == len(w.embed_tokens)
            taps = (Tap(("inp_embd", None), b["x"], (width,)),) if last else ()
            yield kernels.embed_site(self._device, window, b["tokens"], b["x"], taps=taps)
        for i in layers:
            yield from self._joined_attention(i, w.layers[i])
            yield from self._joined_experts(i, w.layers[i])
        yield self._norm(b["down"], w.norm, 0, (Tap(("result_norm", None), b["h"], (width,)),))

    def _joined_dense(self, buffers: list[DenseBuffer], x: Any, y: Any, **options: Any) -> Iterator[Site]:
        taps = options.pop("taps")
        for n, buffer in enumerate(buffers, 1):
            own = taps if n == len(buffers) else ()
            yield vectors.dense_site(
                self._device,
                buffer,
                x,
                y,
                self._buffers.step,
                eps=self._config.rms_norm_eps,
                taps=own,
                **options,
            )

    def _joined_attention(self, i: int, layer: LayerBuffers) -> Iterator[Site]:
        b, width = self._buffers, self._config.hidden_size
        taps = self._attention_taps(i)
        norm = (layer.input_layernorm, b["h"])
        first = (Tap(("attn_norm", i), b["h"], (width,)), *taps["qkv"])
        yield from self._joined_dense(layer.qkv, b["x"], b["qkv"], norm=norm, taps=first)
        yield from vectors.attention_sites(
            self._device,
            b.step,
            {**self._rope_buffers(i, layer), 9: b["attended"], 10: b["parts"]},
            **self._head_shape,
            eps=self._config.rms_norm_eps,
            taps=taps["rope"],
            joined_taps=taps["attended"],
        )
        yield from self._joined_dense(
            layer.o_proj,
            b["attended"],
            b["x"],
            sums=b["attn_out"],
            taps=(Tap(("attn_out", i), b["attn_out"], (width,)), Tap(("ffn_inp", i), b["x"], (width,))),
        )

    def _joined_experts(self, i: int, layer: LayerBuffers) -> Iterator[Site]:
        b, c = self._buffers, self._config
        width, chosen = c.hidden_size, c.num_experts_per_tok
        taps = self._expert_taps(i)
        yield from self._joined_dense(
            layer.router,
            b["x"],
            b["router_logits"],
            norm=(layer.post_attention_layernorm, b["h"]),
            keeps=True,
            router=True,
            taps=(Tap(("ffn_norm", i), b["h"], (width,)), *taps["router"]),
        )
        yield self._choice(i, taps["choice"])
        ids = b.of_layer("ids", i)
        for n, pair in enumerate(layer.gate_up, 1):
            own = taps["gated"] if n == len(layer.gate_up) else ()
            yield vectors.expert_site(
                self._device, pair, b["h"], b["act"], b.step, ids, plane=self._plane, taps=own
            )
        yield vectors.down_site(
            self._device,
            layer.down[0],
            b["act"],
            b["x"],
            b.step,
            {5: ids, 6: b["expert_weights"], 7: b["sums"], 9: b["down"]},
            chosen=chosen,
            taps=(
                *taps["down"],
                Tap(("ffn_moe_out", i), b["sums"], (width,)),
                Tap(("l_out", i), b["x"], (width,)),
            ),
        )

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

    def _rounding(self, x: Any, values: int, names: Iterable[str]) -> Iterator[Site]:
        """Rounds x, ``values`` of each token, where a kernel of these names reads it so."""
        if "tile_bytes" in names:
            b = self._buffers
            yield tiles.rounding_site(self._device, x, b["rounded"], b.step, values)

    def _dense(
        self,
        weights: Sequence[DenseBuffer],
        x: Any,
        y: Any,
        y_stride: int,
        taps: tuple[Tap, ...] = (),
        *,
        head: bool = False,
    ) -> Iterator[Site]:
        tuned, columns = self._device.tuning.tiles, weights[0].segments[0].columns
        names = [tiles.dense_kernel(tuned, w.segments, wide=self._is_wide)[0] for w in weights]
        yield from self._rounding(x, columns, names)
        for i, buffer in enumerate(weights):
            yield kernels.dense_site(
                self._device,
                buffer,
                x,
                y,
                self._buffers.step,
                tokens=self._tokens,
                y_stride=y_stride,
                rounded=self._buffers.named.get("rounded"),
                head=head,
                taps=taps if i + 1 == len(weights) else (),
            )

    def _attention_taps(self, i: int) -> dict[str, tuple[Tap, ...]]:
        b, c = self._buffers, self._config
        heads, kv_heads, head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        qkv, both = (heads + 2 * kv_heads, head_dim), (heads + kv_heads, head_dim)
        q, k, v = slice(heads), slice(heads, heads + kv_heads), slice(heads + kv_heads, None)
        normed, behind = ((b["roped"], both), 4 * int(np.prod(both))) if self._joins else ((b["qkv"], qkv), 0)
        return {
            "qkv": tuple(Tap((f"{n}cur", i), b["qkv"], qkv, p) for n, p in (("Q", q), ("K", k), ("V", v))),
            "rope": (
                Tap(("Qcur_normed", i), *normed, q, offset=behind),
                Tap(("Kcur_normed", i), *normed, k, offset=behind),
                Tap(("Qcur_rope", i), b["roped"], both, q),
                Tap(("Kcur_rope", i), b["roped"], both, k),
            ),
            "attended": (Tap(("kqv_out", i), b["attended"], (heads, head_dim)),),
        }

    def _rope_buffers(self, i: int, layer: LayerBuffers) -> dict[int, Any]:
        b = self._buffers
        named = {2: b["qkv"], 3: layer.head_norms, 4: b["rope_table"], 5: b["roped"]}
        return {**named, 6: b.keys[i], 7: b.values[i]}

    @property
    def _attention_tokens(self) -> int:
        """Tokens of a long prompt that a workgroup of attention takes together."""
        tuned = self._device.tuning.tiles
        return tuned.attention_tokens if tuned and self._is_wide else 1

    @property
    def _is_wide(self) -> bool:
        tuned = self._device.tuning.tiles
        return tuned is not None and self._tokens == tuned.tokens

    @property
    def _head_shape(self) -> dict[str, Any]:
        c = self._config
        return {
            "heads": c.num_attention_heads,
            "kv_heads": c.num_key_value_heads,
            "head_dim": c.head_dim,
            "capacity": self._capacity,
            "f16": self._f16,
        }

    def _attention(self, i: int, layer: LayerBuffers) -> Iterator[Site]:
        b, c, taps = self._buffers, self._config, self._attention_taps(i)
        y_stride = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        yield from self._dense(layer.qkv, b["h"], b["qkv"], y_stride, taps["qkv"])
        yield kernels.rope_site(
            self._device,
            b.step,
            self._rope_buffers(i, layer),
            **self._head_shape,
            eps=c.rms_norm_eps,
            taps=taps["rope"],
        )
        yield from kernels.attention_sites(
            self._device,
            b.step,
            b["roped"],
            b.keys[i],
            b.values[i],
            b["attended"],
            b["parts"],
            **self._head_shape,
            span=self._span,
            tokens=self._attention_tokens,
            taps=taps["attended"],
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

    def _expert_tile(self, layer: LayerBuffers) -> int:
        """Pairs of a tile."""
        tuning = self._device.tuning
        if not self._is_wide:
            return self._tokens
        return tiles.expert_tile(tuning, [*layer.gate_up, *((stack,) for stack in layer.down)])

    def _expert_kernels(self, groups: Sequence[Sequence[ExpertBuffer]], tile: int) -> list[str]:
        tuned = self._device.tuning.tiles
        return [tiles.expert_kernel(tuned, group, tile)[0] for group in groups]

    @property
    def _plane(self) -> int:
        """Floats between the SwiGLU and, when recording, gate and up."""
        return self._buffers.workspace.nbytes["act"] // 12

    def _expert_taps(self, i: int) -> dict[str, tuple[Tap, ...]]:
        b, c = self._buffers, self._config
        experts, chosen, inner = c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size
        return {
            "router": (Tap(("ffn_moe_logits", i), b["router_logits"], (experts,)),),
            "choice": (
                Tap(("ffn_moe_probs", i), b["probs"], (experts,)),
                Tap(("ffn_moe_topk", i), b["ids"], (chosen,), dtype=np.int32, offset=b.layer_offset(i)),
                Tap(("ffn_moe_weights_norm", i), b["expert_weights"], (chosen,)),
            ),
            "gated": tuple(
                Tap((name, i), b["act"], (chosen, inner), offset=4 * self._plane * at)
                for at, name in enumerate(("ffn_moe_swiglu", "ffn_moe_gate", "ffn_moe_up"))
            ),
            "down": (Tap(("ffn_moe_down", i), b["down"], (chosen, c.hidden_size)),),
        }

    def _choice(self, i: int, taps: tuple[Tap, ...]) -> Site:
        b, c = self._buffers, self._config
        return kernels.router_site(
            self._device,
            b.step,
            b["router_logits"],
            b["probs"],
            b.of_layer("ids", i),
            b["expert_weights"],
            b.of_layer("replay", i),
            experts=c.num_experts,
            chosen=c.num_experts_per_tok,
            taps=taps,
        )

    def _experts(self, i: int, layer: LayerBuffers) -> Iterator[Site]:
        b, c, taps = self._buffers, self._config, self._expert_taps(i)
        experts, chosen = c.num_experts, c.num_experts_per_tok
        yield from self._dense(layer.router, b["h"], b["router_logits"], experts, taps["router"])
        yield self._choice(i, taps["choice"])
        routing = {"ids": b.of_layer("ids", i), "tiles": b["tiles"], "order": b["order"]}
        tile = self._expert_tile(layer)
        if self._tokens > 1:
            yield kernels.group_site(
                self._device,
                b.step,
                routing["ids"],
                b["tiles"],
                b["order"],
                experts=experts,
                chosen=chosen,
                tokens=tile,
            )
        yield from self._rounding(b["h"], c.hidden_size, self._expert_kernels(layer.gate_up, tile))
        for n, pair in enumerate(layer.gate_up):
            yield kernels.expert_site(
                self._device,
                pair,
                b["h"],
                b["act"],
                b.step,
                routing,
                tokens=tile,
                x_div=chosen,
                rounded=b.named.get("rounded"),
                plane=self._plane,
                taps=taps["gated"] if n + 1 == len(layer.gate_up) else (),
            )
        downs = [(stack,) for stack in layer.down]
        yield from self._rounding(
            b["act"], chosen * c.moe_intermediate_size, self._expert_kernels(downs, tile)
        )
        for n, stack in enumerate(layer.down):
            yield kernels.expert_site(
                self._device,
                [stack],
                b["act"],
                b["down"],
                b.step,
                routing,
                tokens=tile,
                x_div=1,
                rounded=b.named.get("rounded"),
                taps=taps["down"] if n + 1 == len(layer.down) else (),
            )

"""A layer's weights as rows of stacks that hold all layers': what a kernel needs to find them by itself."""

from dataclasses import dataclass, field

import jax

from qwen3_moe_jax.convert.packed import PackedTensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OfLayers:
    """One tensor of every layer.

    Attributes:
      options: stacks [R, K], one for each type that the tensor has in some layer.
      firsts: of each layer, the first row in its stack.
      which: of each layer, the index of its stack.
      shape: [N, K], or [E, N, K] for experts.
    """

    options: tuple[PackedTensor, ...]
    firsts: tuple[int, ...] = field(metadata={"static": True})
    which: tuple[int, ...] = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})


@dataclass(frozen=True)
class LayerWeights:
    """Weights of all layers; norms are float32 [L, size]."""

    input_layernorm: jax.Array
    q_proj: OfLayers
    k_proj: OfLayers
    v_proj: OfLayers
    q_norm: jax.Array
    k_norm: jax.Array
    o_proj: OfLayers
    post_attention_layernorm: jax.Array
    router: OfLayers
    gate_proj: OfLayers
    up_proj: OfLayers
    down_proj: OfLayers

    def experts(self) -> tuple[OfLayers, OfLayers, OfLayers]:
        return self.gate_proj, self.up_proj, self.down_proj

    def together(self) -> tuple[OfLayers, tuple[int, ...], tuple[int, ...]]:
        """Queries, keys and, where they lie there, values as one matrix.

        Returns:
          The matrix; v_proj's stacks that are not its own; and of each layer, whose result has the
          values: 0 for the matrix', 1 for the first of those stacks, and so on.

        Raises:
          NotImplementedError: the matrices do not lie one after the other.
        """
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        if len(q.options) > 1 or len(k.options) > 1 or q.options[0] is not k.options[0]:
            raise NotImplementedError("q_proj and k_proj are not of one type, in one stack")
        inside = [i for i, stack in enumerate(v.options) if stack is q.options[0]]
        others = tuple(i for i in range(len(v.options)) if i not in inside)
        which = tuple(0 if w in inside else 1 + others.index(w) for w in v.which)
        for layer, first in enumerate(q.firsts):
            after_q, after_k = first + q.shape[0], first + q.shape[0] + k.shape[0]
            if k.firsts[layer] != after_q or (not which[layer] and v.firsts[layer] != after_k):
                raise NotImplementedError("q_proj, k_proj and v_proj do not lie one after the other")
        rows = q.shape[0] + k.shape[0] + (v.shape[0] if inside else 0)
        whole = OfLayers(q.options, q.firsts, (0,) * len(q.firsts), (rows, q.shape[1]))
        return whole, others, which

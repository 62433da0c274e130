"""The list of all programs that a session can need, with the shapes of their arguments.

A session is ``slots`` sequences at a time with a context of so many tokens: one for ``generate``, ``chat``
and ``stream``, more for ``generate_batch`` and ``serve``. Depth, number of tokens, sampling, stops and
masks are arguments, not programs: a session of one slot needs 8.

=====================  ==============================================  ==================
program                one for each of                                 with B slots
=====================  ==============================================  ==================
``empty_state``                                                        1
``admit``, ``release``                                                 2
``clear``              after logits that are not finite                1
``decode``             numbers of rows: 1, 2, 4, ... B                 1 + log2 B
``decode_one``         numbers of rows that a GPU's kernel does not    4 for 64 slots
                       take, greedy and sampled
``prefill``            PREFILL_CHUNKS, prompts 1, 2, 4, ... together;  3 for 1 slot, 13
                       on a CPU 1, 4, 16 with tokens of all slots      for 16; a CPU's 8
``write_draft``        DRAFTS, where prompt lookup is asked for        2, of 1 slot
=====================  ==============================================  ==================

``rows`` (copies of a row, for serve's prefixes) are small and made as they are asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.core.lookup import DRAFTS
from qwen3_moe_jax.core.runner import ForwardShape
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import consecutive, draft_step, generate, one_token
from qwen3_moe_jax.jax_backend import slots as slot_programs
from qwen3_moe_jax.jax_backend.decode_path import Decoder
from qwen3_moe_jax.jax_backend.device import Device
from qwen3_moe_jax.jax_backend.forward import forward_chunk
from qwen3_moe_jax.jax_backend.generate import PREFILL_CHUNKS
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, whole_tiles
from qwen3_moe_jax.jax_backend.params import Params, Types, device_params
from qwen3_moe_jax.jax_backend.programs import Program
from qwen3_moe_jax.jax_backend.qwen3_moe import Qwen3Moe
from qwen3_moe_jax.jax_backend.remembered_choice import remembered_choice
from qwen3_moe_jax.jax_backend.sharded_params import sharded_shapes
from qwen3_moe_jax.jax_backend.step_sizes import prompt_counts, row_counts, rows_beside
from qwen3_moe_jax.jax_backend.token_choice import SamplingArrays
from qwen3_moe_jax.jax_backend.wanted import Wanted

T = TypeVar("T")

SMALL = 0.05
"""The cost of a program that compiles at once."""


@dataclass(frozen=True)
class Session:
    """What its programs depend on.

    Attributes:
      decoder, params: the network; ``params`` may be shapes (``params.device_params``).
      capacity: tokens that a sequence may have.
      cache_dtype: of the KV cache, by name.
      slots: sequences at a time.
      drafts: whether drafts are checked, of one slot (``draft_step``).
    """

    decoder: Decoder
    params: Params
    capacity: int
    cache_dtype: str
    slots: int = 1
    drafts: bool = False

    @classmethod
    def of(
        cls,
        model: Qwen3Moe,
        types: Types,
        device: Device,
        capacity: int,
        cache_dtype: Any,
        slots: int = 1,
        drafts: bool = False,
    ) -> "Session":
        """That of a model whose weights need not be loaded.

        Raises:
          BackendUnavailableError: drafts are asked for, and ``check_drafts`` refuses them.
        """
        shapes = _params_of(model, types, device)
        decoder = remembered_choice(model, types, shapes, device, cache_dtype)
        found = cls(decoder, shapes, capacity, jnp.dtype(cache_dtype).name, slots, drafts)
        if drafts:
            found.check_drafts()
        return found

    def check_drafts(self) -> None:
        """Refuses to check drafts where that might change what is written.

        Raises:
          BackendUnavailableError: saying why.
        """
        if why := self._reason_against_drafts:
            raise BackendUnavailableError(f"prompt lookup cannot keep the answer's bits here: {why}")

    @cached_property
    def _reason_against_drafts(self) -> str | None:
        return consecutive.reason_against(self.decoder, self.params, 1 + max(DRAFTS), self.state.cache)

    def programs(self) -> list[Wanted]:
        """All of them, in the order in which a session first needs them."""
        empty, admit, release = self._small()
        clear = Wanted(slot_programs.clear, self._slot, "clearing a slot", SMALL)
        return [
            empty,
            admit,
            self.prompt(PREFILL_CHUNKS[0]),
            self.tokens(1),
            release,
            *(self.draft(size) for size in DRAFTS if self.drafts),
            *(self.prompt(chunk) for chunk in PREFILL_CHUNKS[:0:-1]),
            *(self.tokens(rows) for rows in row_counts(self.slots)[1:]),
            *self._one_token(),
            *self._prompts_together(),
            clear,
        ]

    @property
    def _slot(self) -> dict[str, Any]:
        return {"state": self.state, "slot": jax.ShapeDtypeStruct((), np.int32)}

    def _small(self) -> list[Wanted]:
        """What every prompt needs beside its chunks."""
        return [
            Wanted(generate.empty_state, self.empty, "empty slots", SMALL),
            Wanted(slot_programs.admit, self._admission(), "taking a prompt in", SMALL),
            Wanted(slot_programs.release, self._slot, "giving a slot back", SMALL),
        ]

    @property
    def empty(self) -> dict[str, Any]:
        """The arguments of ``generate.empty_state``."""
        return {
            "config": self.decoder.model.config,
            "slots": self.slots,
            "length": cache_length(self.capacity),
            "capacity": self.capacity,
            "dtype": self.cache_dtype,
            "shards": self.decoder.shards,
        }

    @cached_property
    def state(self) -> generate.DecodeState:
        """The shapes of the slots."""
        return self._placed(jax.eval_shape(lambda: generate.empty_state.function(**self.empty)))

    def _placed(self, shapes: T) -> T:
        """Shapes of a state or a cache with their places on a mesh."""
        shards = self.decoder.shards
        return shapes if shards is None else shards.placed(shapes)

    def cache(self, length: int, rows: int = 1) -> KVCache:
        """The shapes of a cache."""
        config, dtype, shards = self.decoder.model.config, jnp.dtype(self.cache_dtype), self.decoder.shards
        heads = shards.cache_heads if shards else None
        return self._placed(jax.eval_shape(lambda: KVCache.create(config, rows, length, dtype, heads=heads)))

    def first(self, prompt_tokens: int) -> list[Wanted]:
        """What the first tokens after a prompt wait for, that which compiles longest first."""
        chunks = generate.chunk_lengths(max(prompt_tokens, 1))
        prompts = [self.prompt(chunk) for chunk in dict.fromkeys(chunks)]
        return [self.tokens(1), *prompts, *self._small()]

    def forward(self, tokens: int, capture: frozenset[str], layers: Sequence[int] | None = None) -> Wanted:
        """A forward pass over a prompt of one chunk that shows stages (``Runner.forward``)."""
        (wanted,) = self.forwards(ForwardShape(tokens, capture, None if layers is None else tuple(layers)))
        return wanted

    def forwards(self, shape: ForwardShape) -> list[Wanted]:
        """The programs of a forward pass, one for each length of its chunks."""
        decoder = self.decoder.clone(capture=shape.capture, interventions=(), layers=shape.layers)
        config, rows = self.decoder.model.config, shape.rows
        chunks = generate.chunk_lengths(shape.tokens, shape.chunk_sizes or PREFILL_CHUNKS)
        layers, chosen = config.num_hidden_layers, config.num_experts_per_tok
        experts = lambda chunk: jax.ShapeDtypeStruct((layers, rows, chunk, chosen), np.int32)
        return [
            Wanted(
                forward_chunk,
                {
                    "decoder": decoder,
                    "params": self.params,
                    "cache": self.cache(whole_tiles(sum(chunks)), rows),
                    "token_ids": jax.ShapeDtypeStruct((rows, chunk), np.int32),
                    "start": jax.ShapeDtypeStruct((rows,), np.int32),
                    "expert_ids": experts(chunk) if shape.is_forced else None,
                    "row": (rows - 1) // 2,
                },
                "the check of a file",
                1.0,
            )
            for chunk in dict.fromkeys(chunks)
        ]

    def tokens(self, rows: int) -> Wanted:
        """Writes tokens of the first ``rows`` slots."""
        steps = jax.ShapeDtypeStruct((), np.int32)
        label = "tokens" if rows == 1 else f"tokens of {rows} sequences"
        return self._wanted(generate.decode, {"steps": steps, "rows": rows}, label, 1.5)

    def draft(self, size: int) -> Wanted:
        """Checks a draft of so many tokens."""
        shape = jax.ShapeDtypeStruct
        draft = {"draft": shape((size,), np.int32), "count": shape((), np.int32)}
        return self._wanted(draft_step.write_draft, draft, f"drafts of {size} tokens", 1.0)

    def prompt(self, chunk: int, count: int = 1) -> Wanted:
        """Reads ``chunk`` tokens of ``count`` prompts, and writes a token of ``rows_beside`` slots."""
        rows = rows_beside(self.slots, self.decoder.has_kernel)
        slots = jax.ShapeDtypeStruct((count,), np.int32)
        many = "" if count == 1 else f"{count} x "
        beside = f" beside {rows} sequences" if rows else ""
        label = f"prompts of {many}{chunk} tokens{beside}"
        return self._wanted(generate.prefill, {"slots": slots, "chunk": chunk, "rows": rows}, label, 1.0)

    def _wanted(self, program: Program, more: dict[str, Any], label: str, cost: float) -> Wanted:
        arguments = {"decoder": self.decoder, "params": self.params, "state": self.state, **more}
        return Wanted(program, arguments, label, cost)

    def _one_token(self) -> Iterator[Wanted]:
        """Of more sequences than the decode kernel takes, on a GPU that has it."""
        for rows in row_counts(self.slots) if self.decoder.has_kernel else ():
            if not self.decoder.is_one_launch(rows):
                for work in one_token.WORKS:
                    more = {"rows": rows, "work": work}
                    yield self._wanted(one_token.decode_one, more, f"a token of {rows} sequences", 1.0)

    def _prompts_together(self) -> Iterator[Wanted]:
        for chunk in PREFILL_CHUNKS:
            for count in prompt_counts(self.slots, chunk, has_kernel=self.decoder.has_kernel)[1:]:
                yield self.prompt(chunk, count)

    def _admission(self) -> dict[str, Any]:
        vocab_size = self.decoder.model.config.vocab_size
        shape = jax.ShapeDtypeStruct
        number, flag = shape((), np.int32), shape((), np.bool_)
        sampling = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, SamplingArrays.of([Sampling()])))
        return {
            "state": self.state,
            "slot": number,
            "tokens": shape((self.capacity,), np.int32),
            "length": number,
            "limit": number,
            "is_stop": shape((vocab_size,), np.bool_),
            "sampling": sampling,
            "filled": number,
            "written": number,
            "allowed": shape((-(-vocab_size // 32),), np.int32),
            "masked": flag,
        }


def _params_of(model: Qwen3Moe, types: Types, device: Device) -> Params:
    """The shapes of a model's parameters on a device, or on the devices of a mesh."""
    if model.shards is None:
        return device_params(model.config, types, device)
    return sharded_shapes(model.shards, types, device)


FirstForward = tuple[int, frozenset[str], Sequence[int] | None]
"""Arguments of ``Session.forward``."""


def dtypes_on(device: Device, compute_dtype: Any = None, cache_dtype: Any = None) -> tuple[Any, Any]:
    """The dtypes of operands and of the KV cache; None is what suits the device."""
    on_gpu = device.platform == "gpu"
    compute = jnp.dtype(compute_dtype or (jnp.bfloat16 if on_gpu else jnp.float32))
    return compute, jnp.dtype(cache_dtype or (jnp.float16 if on_gpu else jnp.float32))


def cache_length(context: int) -> int:
    """Positions of a cache for ``context`` tokens and one more chunk, in whole tiles."""
    return whole_tiles(context + PREFILL_CHUNKS[-1])

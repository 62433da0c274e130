"""The protocol that every backend speaks: jax, wgpu and reference are runners of the whole model.

``runner_arguments`` checks the arguments of its methods for every backend; ``one_at_a_time`` gives a
backend that runs one sequence at a time the methods that take several.
"""

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.batch import FinishReason, RowBatch, TokenScore
from qwen3_moe_jax.core.lookup import PromptLookup
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import StageKey

TokenIds = Sequence[int] | NDArray[np.integer]

Platform = Literal["cpu", "gpu"]

IsOver = Callable[[int, list[int]], bool]
"""Told a request's number and its new tokens; True ends it, as a stop token would."""


@dataclass(frozen=True)
class Forward:
    """What one forward pass over a prompt gives.

    Attributes:
      logits: float32 [T, V].
      expert_ids: int32 [L, T, X], each token's experts in every layer, most probable first.
      stages: the captured stages, each with the shape that ``stages.STAGES`` states.
    """

    logits: np.ndarray
    expert_ids: np.ndarray
    stages: dict[StageKey, np.ndarray] = field(default_factory=dict[StageKey, np.ndarray])


@dataclass
class Generated:
    """What was written after one prompt: tokens, without a stop token, and why it ended."""

    tokens: list[int] = field(default_factory=list[int])
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do beyond running one prompt.

    Attributes:
      beside: ``forward`` takes other sequences into its batch.
      interventions: ``forward`` takes changes of stages.
      open_batch: many sequences share a forward pass; their rows of the cache can be copied and saved,
        and their next tokens masked (``Batch``).
      dequantized: weights can be read back as the backend's own code unpacks them.
      concurrent: forward passes, and one stream, may run at the same time.
      lookup: streams check drafts (``core.lookup``).
    """

    beside: bool = False
    interventions: bool = False
    open_batch: bool = False
    dequantized: bool = False
    concurrent: bool = False
    lookup: bool = False


@dataclass(frozen=True)
class Compilation:
    """Of the programs that a backend compiles while it runs.

    Attributes:
      seconds: how long this process has waited for programs.
      is_waiting: whether it waits for one now.
      count_ready: counts the programs that are in memory, which takes milliseconds.
      wanted: how many the model is known to need.
      trouble: why programs are not kept, or were made again: one line for each reason.
      are_kept: whether the next process finds them.
    """

    seconds: float
    is_waiting: bool
    count_ready: Callable[[], int]
    wanted: int
    trouble: tuple[str, ...]
    are_kept: bool = True


class ForwardOptions(TypedDict, total=False):
    """The optional arguments of ``Runner.forward``.

    Keys:
      capture: names of stages to return.
      expert_ids: int32 [L, T, X]; forces these experts (router replay). Their
        weights are still this runner's own router probabilities, renormalized.
      layers: runs only these layers, one after the other, for a quick check of
        a large model; L is then their number, and stages carry their own numbers.
      chunk_sizes: lengths of the pieces in which the prompt is put into the
        cache; (1,) takes the path of decoding. Each backend has its own default.
      beside: other sequences that run in the same batch, which has ``token_ids`` as its
        row len(beside) // 2. They are cut or padded to T tokens and take the same
        ``expert_ids``; the result is that of ``token_ids`` alone.
      interventions: changes of stages (``jax_backend.qwen3_moe.Intervention``), made inside the model.
    """

    capture: Collection[str]
    expert_ids: NDArray[np.integer] | None
    layers: Sequence[int] | None
    chunk_sizes: Sequence[int]
    beside: Sequence[TokenIds]
    interventions: Sequence[object]


@dataclass(frozen=True)
class ForwardShape:
    """What the programs of ``Runner.forward`` depend on.

    Attributes:
      tokens: of the prompt.
      capture, layers: as in ``ForwardOptions``; None is all layers.
      chunk_sizes: as there; none is the backend's own.
      rows: sequences of the batch.
      is_forced: whether experts are given; of all layers then.
    """

    tokens: int
    capture: frozenset[str] = frozenset()
    layers: tuple[int, ...] | None = None
    chunk_sizes: tuple[int, ...] = ()
    rows: int = 1
    is_forced: bool = False


class Runner(Protocol):
    """A backend that holds one loaded model.

    After ``close`` every method but ``describe``, ``compilation`` and ``close`` raises ModelClosedError, and
    so does a stream that is open.
    """

    @property
    def name(self) -> str:
        """ "jax", "wgpu" or "reference"."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What this backend can do beyond running one prompt."""
        ...

    @property
    def config(self) -> Qwen3MoeConfig:
        """The model's hyper-parameters."""
        ...

    @property
    def platform(self) -> Platform:
        """Whether a GPU computes, or this machine's cores."""
        ...

    @property
    def max_context(self) -> int:
        """Tokens that the KV cache holds."""
        ...

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the KV cache of one sequence of ``max_context`` tokens."""
        ...

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values."""
        ...

    def free_nbytes(self) -> int | None:
        """Bytes that caches could take now; None where the device does not tell."""
        ...

    def set_max_context(self, tokens: int) -> None:
        """Changes ``max_context`` of the caches that are made from now on.

        Raises:
          BackendUnavailableError: the cache was made with the weights (``capabilities.open_batch``).
        """
        ...

    @property
    def reused_tokens(self) -> int:
        """Tokens of the last stream's prompt that were in the cache already."""
        ...

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` has been called."""
        ...

    def describe(self) -> dict[str, object]:
        """What runs where, for the banner and for receipts.

        Keys: backend, device, compute_dtype; weights, where these are mapped from a file;
        implementations, one name for each quantization type; fallbacks, a line for each
        part that runs on less than this backend's best implementation; batch_invariant,
        whether decoding gives a sequence the same bits whatever other sequences (up to 15) run in its batch.
        """
        ...

    def compilation(self) -> Compilation | None:
        """Of programs that are compiled as they are needed; None if loading compiled them all."""
        ...

    def expect(self, shapes: Sequence[ForwardShape]) -> None:
        """These forward passes will be asked for: a backend that compiles may begin with their programs."""
        ...

    def close(self) -> None:
        """Gives back the memory of weights and cache; a second call does nothing."""
        ...

    def forward(self, token_ids: TokenIds, **options: Unpack[ForwardOptions]) -> Forward:
        """Runs the prompt of T token ids from an empty cache.

        Raises:
          ContextOverflowError: T is more than max_context.
          ValueError: what ``checked_forward`` refuses.
        """
        ...

    def log_likelihoods(self, token_ids: TokenIds, *, first: int = 1) -> NDArray[np.float64]:
        """``ln p(token_ids[i] | token_ids[:i])`` of every i from ``first`` (at least 1) on: [T - first].

        Logits are never there for all positions at once. Values are not finite where
        logits were not.

        Raises:
          ContextOverflowError: T is more than max_context.
        """
        ...

    def token_scores(self, token_ids: TokenIds, *, top: int, first: int = 1) -> list[TokenScore]:
        """As ``log_likelihoods``, with the ``top`` likeliest tokens of each position (at most 20).

        Raises:
          ContextOverflowError: T is more than max_context.
        """
        ...

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
        """Yields new token ids as they come; ends after max_tokens, or before one of stop_ids.

        Args:
          token_ids: the prompt.
          max_tokens: at most this many new tokens.
          sampling: how a token is chosen.
          stop_ids: tokens that end the text.
          reuse: a backend that can reads only what the prompt has beyond the last stream's prompt and text
            (``reused_tokens``). Keys and values are then of another chunking: equal but for rounding.
          lookup: drafts what comes next, and counts; the tokens are the same without it.

        Raises:
          BackendUnavailableError: ``lookup`` is given, and with it other tokens might come.
          ContextOverflowError: the prompt leaves no room in the cache.
          NumericalError: logits were not finite.
        """
        ...

    def open_batch(self, slots: int, *, context: int | None = None, is_invariant: bool = False) -> RowBatch:
        """Slots for sequences that run together, with a KV cache of their own.

        Args:
          slots: how many.
          context: tokens that each may have; None is ``max_context``.
          is_invariant: a sequence has the same bits alone and in any company: prompts are read one at a
            time, in chunks that depend on the prompt alone.

        Raises:
          BackendUnavailableError: this backend runs one sequence at a time (``capabilities``), or its bits
            depend on how many run together (``describe``: batch_invariant), or on so many.
          MemoryPlanError: they do not fit the memory that is free.
        """
        ...

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int],
        sampling: Sampling | Sequence[Sampling],
        stop_ids: Collection[int] = (),
        slots: int | None = None,
        is_over: IsOver | None = None,
    ) -> list[Generated]:
        """What the model writes after each prompt, many of them at a time where the backend can.

        Args:
          prompts: token ids of each.
          max_tokens: new tokens at most, of all or of each.
          sampling: of all, their seed included, or of each.
          stop_ids: tokens that end a sequence.
          slots: sequences at a time; None is what suits the backend.
          is_over: ends a sequence early.

        Raises:
          ContextOverflowError: a prompt leaves no room in the context.
          MemoryPlanError: the cache does not fit the memory that is free.
        """
        ...

    def dequantized(self, path: str, tile: int, expert: int | None = None) -> NDArray[np.float32]:
        """Sixteen rows of a matrix as this backend's own code unpacks them: float32 [16, K], or the rest.

        Args:
          path: of the parameter.
          tile: rows 16 tile to 16 tile + 15 are wanted.
          expert: which matrix of an expert stack.

        Raises:
          BackendUnavailableError: this backend cannot show them (``capabilities``).
        """
        ...

    def memory(self) -> dict[str, int] | None:
        """Bytes of device memory: "peak", "planned", "cache"; None where the device does not tell."""
        ...

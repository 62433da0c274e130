"""The one check of the arguments of a runner's methods: every backend refuses the same ones."""

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_moe_jax.convert.config import Qwen3MoeConfig
from qwen3_moe_jax.core.arguments import check_count, check_list, check_number, wrong_kind
from qwen3_moe_jax.core.errors import BackendUnavailableError, ContextOverflowError, ModelClosedError
from qwen3_moe_jax.core.lookup import PromptLookup
from qwen3_moe_jax.core.runner import Runner, TokenIds
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.core.stages import STAGES

NO_LOOKUP = "the {} backend has no prompt lookup: leave it out"
"""Of a backend's name."""


@dataclass(frozen=True, eq=False)
class ForwardRequest:
    """Arguments of ``Runner.forward`` that have been checked; see ``ForwardOptions``.

    Attributes:
      token_ids: int32 [T].
      layers: the layers that run.
      is_whole: whether these are all layers, in their order.
    """

    token_ids: NDArray[np.int32]
    capture: frozenset[str]
    expert_ids: NDArray[np.int32] | None
    layers: tuple[int, ...]
    is_whole: bool
    chunk_sizes: tuple[int, ...]
    beside: tuple[TokenIds, ...]
    interventions: tuple[object, ...]


def checked_forward(
    runner: Runner,
    token_ids: TokenIds,
    *,
    capture: Collection[str] = (),
    expert_ids: NDArray[np.integer] | None = None,
    layers: Sequence[int] | None = None,
    chunk_sizes: Sequence[int] = (),
    beside: Sequence[TokenIds] = (),
    interventions: Sequence[object] = (),
) -> ForwardRequest:
    """The arguments of ``runner.forward``, checked: every backend refuses the same ones.

    Raises:
      ModelClosedError: the runner is closed.
      ContextOverflowError: more tokens than ``max_context``.
      ValueError: no token, an id, layer, stage, chunk or expert that does not exist, a wrong shape, or
        an option that this backend does not have.
    """
    check_open(runner)
    config, can = runner.config, runner.capabilities
    others, changes = check_list("beside", beside), check_list("interventions", interventions)
    if (others and not can.beside) or (changes and not can.interventions):
        what = "other sequences beside a prompt" if others else "interventions"
        raise ValueError(f'the {runner.name} backend takes no {what}: load(backend="jax") does')
    tokens = checked_ids(token_ids, config.vocab_size)
    if len(tokens) > runner.max_context:
        raise ContextOverflowError(len(tokens), runner.max_context)
    stages = check_list("capture", capture)
    for stage in stages:
        check_stage(stage)
    every = tuple(range(config.num_hidden_layers))
    chosen = every if layers is None else check_list("layers", layers)
    if not chosen or any(not _is_layer(layer, len(every)) for layer in chosen):
        raise ValueError(f"layers must be some of 0 to {every[-1]}, not {list(chosen)}")
    chosen, sizes = tuple(map(int, chosen)), check_list("chunk_sizes", chunk_sizes)
    for size in sizes:
        check_count("a size of chunk_sizes", size)
    rows = tuple(checked_ids(row, config.vocab_size) for row in others)
    for intervention in changes:
        _check_intervention(intervention, len(every))
    forced = None if expert_ids is None else _checked_experts(config, expert_ids, len(chosen), len(tokens))
    return ForwardRequest(
        tokens,
        frozenset(stages),
        forced,
        chosen,
        chosen == every,
        sizes,
        rows,
        changes,
    )


def _is_layer(value: object, count: int) -> bool:
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_integer and value in range(count)


def check_stage(stage: object) -> None:
    """Raises ValueError for what is no name of ``stages.STAGES``."""
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(f"no stage is named {stage!r}: choose from {', '.join(STAGES)}")


def _check_intervention(intervention: Any, num_layers: int) -> None:
    """A change of a stage or a layer that is not there would change nothing, and nobody would know."""
    if not callable(getattr(intervention, "change", None)):
        raise wrong_kind("an intervention", intervention, "an Intervention")
    check_stage(intervention.stage)
    if intervention.layer is None:
        return
    check_number("an intervention's layer", intervention.layer)
    if not 0 <= intervention.layer < num_layers:
        raise ValueError(f"an intervention's layer must be 0 to {num_layers - 1}, not {intervention.layer}")


def check_open(runner: Runner) -> None:
    """Raises ModelClosedError if ``runner`` is closed."""
    if runner.is_closed:
        raise ModelClosedError


@contextmanager
def open_throughout(runner: Runner) -> Generator[None]:
    """Raises ModelClosedError at the start, and for what fails since another thread has closed the model."""
    check_open(runner)
    try:
        yield
    except (RuntimeError, LookupError, ValueError, TypeError) as error:
        if runner.is_closed:
            raise ModelClosedError from error
        raise


def checked_ids(token_ids: TokenIds, vocab_size: int) -> NDArray[np.int32]:
    """Token ids as int32 [T].

    Raises:
      ValueError: there are none, they are no integers, or one is not in the vocabulary.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError("token_ids must be a non-empty list of integers")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(f"token id {outside[0]} is not in 0..{vocab_size - 1}")
    return ids.astype(np.int32)


def checked_text(runner: Runner, token_ids: TokenIds, first: int) -> NDArray[np.int32]:
    """The arguments of ``runner.log_likelihoods``, checked; int32 [T].

    Raises:
      ModelClosedError: the runner is closed.
      ContextOverflowError: more tokens than ``max_context``.
      ValueError: as ``checked_ids``, or ``first`` is not one of 1 to T - 1.
    """
    check_open(runner)
    tokens = checked_ids(token_ids, runner.config.vocab_size)
    if len(tokens) > runner.max_context:
        raise ContextOverflowError(len(tokens), runner.max_context)
    check_number("first", first)
    if not 1 <= first < len(tokens):
        raise ValueError(f"first is {first}, and must be 1 to {len(tokens) - 1}")
    return tokens


def checked_prompt(
    runner: Runner, token_ids: Sequence[int], lookup: PromptLookup | None = None
) -> NDArray[np.int32]:
    """The prompt of ``runner.stream``, checked; int32 [T].

    Raises:
      BackendUnavailableError: this backend takes no ``lookup``.
      ContextOverflowError, ValueError: as ``checked_text``.
    """
    check_open(runner)
    if lookup is not None and not runner.capabilities.lookup:
        raise BackendUnavailableError(NO_LOOKUP.format(runner.name))
    tokens = checked_ids(token_ids, runner.config.vocab_size)
    if len(tokens) >= runner.max_context:
        raise ContextOverflowError(len(tokens), runner.max_context)
    return tokens


def _checked_experts(
    config: Qwen3MoeConfig, expert_ids: NDArray[np.integer], num_layers: int, num_tokens: int
) -> NDArray[np.int32]:
    expected = (num_layers, num_tokens, config.num_experts_per_tok)
    ids = np.asarray(expert_ids)
    if ids.shape != expected:
        raise ValueError(f"expert_ids has shape {ids.shape}, expected [L, T, X] = {expected}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expert_ids must be integers, not {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < config.num_experts:
        raise ValueError(f"expert_ids must be 0 to {config.num_experts - 1}")
    return ids.astype(np.int32)


def per_prompt(
    count: int, limits: int | Sequence[int], samplings: Sampling | Sequence[Sampling]
) -> list[tuple[int, Sampling]]:
    """(max_tokens, sampling) of each of ``count`` prompts, where one value stands for all.

    Raises:
      ValueError: another number of values than of prompts.
    """
    limits = [int(limits)] * count if isinstance(limits, int | np.integer) else limits
    samplings = [samplings] * count if isinstance(samplings, Sampling) else samplings
    if not len(limits) == len(samplings) == count:
        raise ValueError(f"{count} prompts, {len(limits)} max_tokens and {len(samplings)} samplings")
    return list(zip(limits, samplings, strict=True))

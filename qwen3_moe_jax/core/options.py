"""Keywords that several methods of a model share: typed for checkers, and shown in signatures."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from qwen3_moe_jax.core.sampling import Sampling

F = TypeVar("F", bound=Callable[..., Any])


class SamplingOptions(TypedDict, total=False):
    """Fields of ``Sampling``, each in place of the recommended one."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    seed: int | None


class GenerateOptions(SamplingOptions, total=False):
    """The keywords of ``Model.generate`` and of its kin; ``Model.open_stream`` explains them."""

    max_tokens: int | None
    sampling: Sampling | None
    stop: str | Sequence[str] | None
    tools: Sequence[dict[str, Any]] | None
    thinking: bool | None
    prefill: str
    special: bool
    prompt_lookup: bool | None


def shows(options: type) -> Callable[[F], F]:
    """Gives a function with ``**options`` the signature that has each keyword of a TypedDict.

    ``help``, and completion in notebooks, show what ``inspect.signature`` says, which does not look
    into ``Unpack``. Every keyword may be left out: its default is shown as None.
    """
    hints: Mapping[str, Any] = inspect.get_annotations(options)
    for base in getattr(options, "__orig_bases__", ()):
        if isinstance(base, type) and base is not TypedDict:
            hints = {**inspect.get_annotations(base), **hints}

    def change(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
            for name, hint in hints.items()
            if name not in names
        ]
        setattr(function, "__signature__", signature.replace(parameters=[*own, *more]))  # noqa: B010
        return function

    return change

"""The errors that a user meets. A bad file is ``qwen3_moe_jax.convert.errors.ModelFileError``.

Messages name the arguments of Python, as ``max_context=4096``; ``for_command_line`` turns them into options.
"""

import re

COMMAND_LINE = {
    "max_context": "--context",
    "max_tokens": "--max-tokens",
    "kv_cache": "--kv-cache",
    "dtype": "--dtype",
    "backend": "--backend",
    "adapter": "--adapter",
    "gate=False": "--no-gate",
}
"""Arguments of ``load`` and ``generate``, and the options that set them."""

_WITH_VALUE = re.compile(rf"\b({'|'.join(n for n in COMMAND_LINE if '=' not in n)})=")
_NAMES = re.compile(r"\b(max_context|max_tokens|kv_cache|gate=False)\b")
"""Names that stand for the argument wherever they are; \"backend\" and \"dtype\" are words too."""


def for_command_line(message: str) -> str:
    """A message with options in place of Python's arguments: ``max_context=64`` is ``--context 64``."""
    message = _WITH_VALUE.sub(lambda m: f"{COMMAND_LINE[m[1]]} ", message)
    return _NAMES.sub(lambda m: COMMAND_LINE[m[1]], message)


class ContextOverflowError(ValueError):
    """The prompt does not fit the KV cache."""

    def __init__(self, num_tokens: int, max_context: int):
        self.num_tokens = num_tokens
        self.max_context = max_context
        super().__init__(
            f"the prompt has {num_tokens} tokens and the context holds {max_context}: "
            "shorten the prompt or raise max_context"
        )


class ModelClosedError(RuntimeError):
    """The model, or its runner, was closed."""

    def __init__(self):
        super().__init__("the model is closed: load it again")


class BatchFullError(RuntimeError):
    """Every slot of a batch is taken."""

    def __init__(self, slots: int):
        super().__init__(f"all {slots} slots of the batch are taken: free one first")


class NumericalError(ArithmeticError):
    """Logits were NaN or infinite, so no token can be chosen."""


class BackendUnavailableError(RuntimeError):
    """A backend cannot run on this machine; the message says why and what to do."""


class MemoryPlanError(RuntimeError):
    """The model does not fit the device's memory; the message has the plan and what would fit."""


class ParityError(RuntimeError):
    """A backend's results are not the reference's; the message names the first stage that departs."""


class HubError(RuntimeError):
    """A model hub cannot be reached, or refuses; the message says why and what to do."""


class OptionError(ValueError):
    """An option or an argument has a value that it cannot have."""


class SettingError(BackendUnavailableError, OptionError):
    """An environment variable, or a setting of JAX, has a value that it cannot have; the message names it."""


class KindError(TypeError, ValueError):
    """An argument is of a kind that it cannot be: a TypeError, and a ValueError as every caller's mistake."""


class OutputFileError(OSError):
    """A file that was asked for cannot be written; the message names it and says why."""

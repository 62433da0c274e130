"""The errors that a user meets. A bad file is ``qwen3_moe_jax.convert.errors.ModelFileError``."""


class ContextOverflowError(ValueError):
    """The prompt does not fit the KV cache."""

    def __init__(self, num_tokens: int, max_context: int):
        self.num_tokens = num_tokens
        self.max_context = max_context
        super().__init__(
            f"the prompt has {num_tokens} tokens and the context holds {max_context}: "
            "shorten the prompt or raise the context length (--context)"
        )


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

"""Of how many rows and prompts a step is: few sizes, for each is a compiled program."""

from qwen3_moe_jax.core.errors import BackendUnavailableError
from qwen3_moe_jax.jax_backend.generate import PREFILL_TOKENS


def row_counts(slots: int) -> list[int]:
    """The numbers of rows that tokens are written for: few, for each is a compiled program."""
    return [*(1 << i for i in range((slots - 1).bit_length())), slots]


def prompt_counts(
    slots: int, chunk: int, maximum: int = PREFILL_TOKENS, *, has_kernel: bool = True
) -> list[int]:
    """The numbers of prompts that one step may read a chunk of: powers of two, so that they are few.

    Powers of four without a GPU's kernels (``has_kernel``): a CPU reads two chunks one after the other
    nearly as fast, and each program takes it as long to make, or to load, as many steps.
    """
    together = min(slots, max(1, maximum // chunk))
    powers = [1 << i for i in range(together.bit_length())]
    return powers if has_kernel else powers[::2]


def rows_beside(slots: int, has_kernel: bool) -> int:
    """For how many slots a step that reads prompts also writes a token: all, or none where there is no other
    or a GPU's kernel writes apart; whether any of them is ready is no other program."""
    return 0 if slots == 1 or has_kernel else slots


def check_invariant(slots: int, *, has_kernel: bool, is_one_launch: bool) -> None:
    """Refuses to promise the same bits in any company.

    Args:
      slots: of the batch.
      has_kernel: whether a GPU's decode kernel runs.
      is_one_launch: whether it takes each number of rows that so many slots can have.

    Raises:
      BackendUnavailableError: what writes tokens of so many slots depends on how many there are.
    """
    if not has_kernel:
        raise BackendUnavailableError(
            "the same bits alone and in company need an NVIDIA GPU's decode kernel: it does not run here"
        )
    if not is_one_launch:
        raise BackendUnavailableError(
            f"the same bits alone and in company: here the decode kernel takes fewer than {slots} sequences"
        )

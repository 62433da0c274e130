"""How the next token is chosen from logits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, in the order in which they are applied.

    Attributes:
      repetition_penalty: > 0; divides positive and multiplies negative logits of
        tokens in the prompt or the output (CTRL, arXiv 1909.05858).
      presence_penalty: subtracted from the logits of tokens already in the output
        (never of those that are only in the prompt).
      temperature: 0 is greedy: the highest logit, lowest id among equals.
      top_k: keep the k highest; 0 keeps all.
      top_p: keep the smallest set whose probabilities sum to >= top_p; 1 keeps all.
      min_p: drop tokens below min_p times the highest probability.
      seed: of the random stream; the same seed gives the same tokens on one backend.

    Raises:
      ValueError: a parameter is out of its range.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

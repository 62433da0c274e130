"""``experts``: which experts a text uses, as a layer-by-expert table and as a picture of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen3_moe_jax.core.output_file import save_arrays
from qwen3_moe_jax.core.pictures import PICTURES, can_draw, drawn, png_of
from qwen3_moe_jax.core.runner import Runner


@dataclass(frozen=True)
class ExpertUsage:
    """How often every expert of every layer was chosen.

    Attributes:
      counts: int64 [L, E]; every row sums to tokens times experts per token.
      tokens: length of the text.
      experts_per_token: X.
      model: the model's name.
      text: the beginning of the text.
    """

    counts: np.ndarray
    tokens: int
    experts_per_token: int
    model: str = ""
    text: str = ""

    def __repr__(self) -> str:
        layers, experts = self.counts.shape
        of = f" of {self.model}" if self.model else ""
        return f"<ExpertUsage{of}: {layers} layers, {experts} experts, {self.tokens} tokens>"

    @property
    def share(self) -> np.ndarray:
        """Share of the tokens that chose each expert: float64 [L, E]."""
        return self.counts / self.tokens

    @property
    def even_share(self) -> float:
        """What every share would be if experts were chosen evenly: X / E."""
        return self.experts_per_token / self.counts.shape[1]

    def balance(self) -> np.ndarray:
        """Entropy of each layer's choices over that of an even one: float64 [L], 1 is even."""
        p = self.counts / self.counts.sum(axis=1, keepdims=True)
        entropy = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=1)
        return entropy / np.log(self.counts.shape[1])

    def unused(self) -> np.ndarray:
        """How many experts of each layer no token chose: int64 [L]."""
        return (self.counts == 0).sum(axis=1)

    def facts(self) -> str:
        """Size of the text and of the model, balance and unused experts, in one line."""
        layers, experts = self.counts.shape
        balance = self.balance()
        return (
            f"{self.tokens:,} tokens, {layers} layers, "
            f"{self.experts_per_token} of {experts} experts per token; "
            f"balance {balance.min():.2f} to {balance.max():.2f} (1 is even), "
            f"{int(self.unused().sum())} never used"
        )

    def save_arrays(self, path: str | Path, against: "ExpertUsage | None" = None) -> None:
        """Writes counts and shares to a file in the ``.npz`` format, at exactly this path.

        ``against``, of another text, is written too, with ``against_`` before its names.

        Raises:
          OutputFileError: it cannot be written.
        """
        arrays = self._arrays()
        if against is not None:
            arrays |= {f"against_{name}": value for name, value in against._arrays().items()}
        save_arrays(path, **arrays)

    def _arrays(self) -> dict[str, np.ndarray]:
        counts = {"tokens": np.array(self.tokens), "experts_per_token": np.array(self.experts_per_token)}
        return {"counts": self.counts, "share": self.share, **counts}

    def save_picture(self, path: str | Path, against: "ExpertUsage | None" = None) -> None:
        """Draws the heatmap in the format that the path's suffix names, one of ``PICTURES``.

        Args:
          path: of the picture.
          against: of another text by the same model: drawn below on the same scale, with the difference.

        Raises:
          ValueError: ``against`` is of a model with other layers or experts.
          OutputFileError: another suffix, or the file cannot be written.
          PicturesUnavailableError: matplotlib, of the extra ``[plot]``, is not installed.
        """
        from qwen3_moe_jax.inspection import heatmap

        if against is not None and against.counts.shape != self.counts.shape:
            sizes = " and ".join("{} x {}".format(*u.counts.shape) for u in (self, against))
            raise ValueError(f"layers by experts are {sizes}: compare texts of one model")
        kind = PICTURES.get(Path(path).suffix.lower(), "")
        drawn(path, lambda: heatmap.draw(self, against, kind=kind))

    def _repr_png_(self) -> bytes | None:
        """The heatmap, for notebooks; None without matplotlib."""
        from qwen3_moe_jax.inspection import heatmap

        return png_of(lambda: heatmap.draw(self)) if can_draw() else None


def difference(a: ExpertUsage, b: ExpertUsage) -> np.ndarray:
    """log2 of B's share over A's: float64 [L, E]; NaN where neither text used the expert.

    Half a token is added to each count, so that an expert that one of them never used has a finite value,
    and one of few tokens no large one.
    """
    ratio = np.log2((b.counts + 0.5) / (b.tokens + 1)) - np.log2((a.counts + 0.5) / (a.tokens + 1))
    return np.where((a.counts == 0) & (b.counts == 0), np.nan, ratio)


def expert_usage(
    runner: Runner, token_ids: Sequence[int], *, model: str = "", text: str = "", window: int | None = None
) -> ExpertUsage:
    """Runs a text and counts the experts of every layer.

    Args:
      runner: a loaded backend.
      token_ids: the text; longer than the context it is run in windows, each from an empty cache.
      model: a name for the picture.
      text: what the text is, for the picture.
      window: tokens of a window; the backend's context by default.

    Raises:
      ValueError: no tokens.
    """
    ids = np.asarray(token_ids, np.int32)
    if not ids.size:
        raise ValueError("the text is empty: give at least one character")
    config = runner.config
    counts = np.zeros((config.num_hidden_layers, config.num_experts), np.int64)
    stride = min(window or runner.max_context, runner.max_context)
    for start in range(0, len(ids), stride):
        chosen = runner.forward(ids[start : start + stride]).expert_ids
        for layer, layer_ids in enumerate(chosen):
            counts[layer] += np.bincount(layer_ids.reshape(-1), minlength=config.num_experts)
    return ExpertUsage(counts, len(ids), config.num_experts_per_tok, model, text)

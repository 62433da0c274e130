"""``trace``: every stage of every layer for a prompt, as figures and as arrays.

On jax it is the jitted model with its stages captured, not a second model.
Arrays go to one ``.npz`` file whose names are llama.cpp's ("ffn_norm-12"), with
the prompt and what the backend said of itself, so that ``bisect`` can judge a
trace that another machine recorded.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from qwen3_moe_jax.core.input_file import open_input
from qwen3_moe_jax.core.output_file import save_arrays
from qwen3_moe_jax.core.runner import Forward, Runner, TokenIds
from qwen3_moe_jax.core.stages import INPUT_STAGES, LAYER_STAGES, OUTPUT_STAGES, STAGES, StageKey


@dataclass(frozen=True)
class StageFigures:
    """One stage of one layer.

    Attributes:
      stage, layer: which.
      shape: of its array.
      min, max, mean: of the finite values; 0 where there are none.
      norm: root of the sum of squares of the finite values.
      nonfinite: NaN and infinite values.
    """

    stage: str
    layer: int | None
    shape: tuple[int, ...]
    min: float
    max: float
    mean: float
    norm: float
    nonfinite: int

    @property
    def where(self) -> str:
        """As llama.cpp writes it: "ffn_norm-12"."""
        return stage_text((self.stage, self.layer))


@dataclass(frozen=True)
class Trace:
    """A recorded forward pass.

    Attributes:
      token_ids: int32 [T].
      facts: the backend's ``describe()``.
      forward: logits, expert choices and stages.
    """

    token_ids: np.ndarray
    facts: Mapping[str, Any]
    forward: Forward

    def __repr__(self) -> str:
        stages = len({name for name, _ in self.forward.stages})
        return (
            f"<Trace: {len(self.token_ids)} tokens, {stages} stages in {len(self.forward.stages)} arrays, "
            f"{self.facts.get('backend', 'no backend')}>"
        )

    def figures(self) -> list[StageFigures]:
        """Every captured stage, in the order of the forward pass."""
        return [_figures(key, self.forward.stages[key]) for key in ordered_keys(self.forward.stages)]

    def experts(self) -> list[dict[str, Any]]:
        """Expert ids and weights of every layer and token, where they were captured."""
        rows = []
        for layer in sorted(n for name, n in self.forward.stages if name == "ffn_moe_topk" and n is not None):
            ids = self.forward.stages["ffn_moe_topk", layer]
            weights = self.forward.stages.get(("ffn_moe_weights_norm", layer))
            for token in range(len(ids)):
                row = {"layer": layer, "token": token, "experts": ids[token].tolist()}
                if weights is not None:
                    row["weights"] = [float(w) for w in weights[token]]
                rows.append(row)
        return rows

    def save(self, path: str | Path) -> None:
        """Writes everything to one file in the ``.npz`` format, at exactly this path.

        Raises:
          OutputFileError: it cannot be written.
        """
        arrays = {stage_text(key): value for key, value in self.forward.stages.items()}
        facts = json.dumps(self.facts, default=str)
        save_arrays(
            path,
            **arrays,
            token_ids=self.token_ids,
            logits=self.forward.logits,
            expert_ids=self.forward.expert_ids,
            facts=np.array(facts),
        )

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Reads a file that ``save`` wrote.

        Raises:
          ValueError: the file is no trace.
        """
        try:
            with open_input(path) as file, np.load(file, allow_pickle=False) as data:
                stages = {stage_key(n): data[n] for n in data.files if n.split("-")[0] in STAGES}
                forward = Forward(data["logits"], data["expert_ids"], stages)
                return cls(data["token_ids"], json.loads(str(data["facts"])), forward)
        except (KeyError, OSError, ValueError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} is no recorded trace ({error}): write one with `trace --payload`"
            ) from error


def trace(
    runner: Runner, token_ids: TokenIds, stages: Collection[str] = tuple(STAGES), **options: Any
) -> Trace:
    """Runs a prompt and keeps its stages.

    Args:
      runner: a loaded backend.
      token_ids: the prompt.
      stages: names of the stages to keep; all by default, which opens the fused expert layer.
      **options: of ``Runner.forward``.

    Raises:
      ValueError: no such stage.
    """
    stages = tuple(stages)
    unknown = set(stages) - STAGES.keys()
    if unknown:
        raise ValueError(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    forward = runner.forward(token_ids, capture=tuple(stages), **options)
    return Trace(np.asarray(token_ids, np.int32), runner.describe(), forward)


def stage_text(key: StageKey) -> str:
    """("ffn_norm", 12) -> "ffn_norm-12"; ("result_norm", None) -> "result_norm"."""
    return key[0] if key[1] is None else f"{key[0]}-{key[1]}"


def stage_key(text: str) -> StageKey:
    """The inverse of :func:`stage_text`."""
    name, _, layer = text.partition("-")
    return name, int(layer) if layer else None


def ordered_keys(stages: Collection[StageKey]) -> list[StageKey]:
    """Stage keys in the order of the forward pass."""
    layers = sorted({layer for _, layer in stages if layer is not None})
    order = [(s.name, None) for s in INPUT_STAGES]
    order += [(s.name, layer) for layer in layers for s in LAYER_STAGES]
    order += [(s.name, None) for s in OUTPUT_STAGES]
    return [key for key in order if key in stages]


def _figures(key: StageKey, value: np.ndarray) -> StageFigures:
    values = value.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high, mean = (finite.min(), finite.max(), finite.mean()) if finite.size else (0.0, 0.0, 0.0)
    norm = float(np.linalg.norm(finite))
    return StageFigures(
        *key, value.shape, float(low), float(high), float(mean), norm, int(values.size - finite.size)
    )


def figures_json(trace: Trace) -> dict[str, Any]:
    """Plain data of a trace without its arrays."""
    return {
        "tokens": trace.token_ids.tolist(),
        "backend": dict(trace.facts),
        "stages": [{**asdict(f), "name": f.where} for f in trace.figures()],
        "experts": trace.experts(),
    }

"""Judges each stage of a forward pass on its own, from the inputs that the backend itself had.

To compare a backend's stage 300 with a reference's stage 300 is to see the sum
of all errors so far. Here the reference computes, in float64, what a stage
should have been **given the captured values that went into it**; what is left
is the error that this stage made. A fault shows in the stage that has it and
in no other, a large model can be judged by a few layers or a few rows of each
matrix, and by induction over the stages a pass with no departure is right.

How much error is allowed follows from arithmetic, not from taste: every
expectation carries the standard deviation of the rounding that is allowed
(``noise``), and a departure is an error above ``MAX_SIGMAS`` of them. What
departs is judged a second time, by a model of rounding that takes longer and
holds for weights of any kind.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain, groupby

import numpy as np

from qwen3_moe_jax.core.stages import (
    INPUT_STAGES,
    INSIDE_EXPERTS,
    LAYER_STAGES,
    OUTPUT_STAGES,
    STAGES,
    StageKey,
)
from qwen3_moe_jax.machine.threads import Workers
from qwen3_moe_jax.parity.expectations import Expectation, Expectations
from qwen3_moe_jax.parity.metrics import nmse
from qwen3_moe_jax.parity.noise import FLOAT32_MAX, MAX_SIGMAS, SMALLEST_NORMAL

FUSED_STAGES = tuple(name for name in STAGES if name not in INSIDE_EXPERTS)
"""What a capture asks for to see the expert layer as it runs in production."""

EXACT_STAGES = frozenset({"ffn_moe_topk"})


@dataclass(frozen=True)
class Judgement:
    """What one stage of one layer is found to be.

    Attributes:
      stage, layer: which.
      tensor: path of the parameter that the stage reads, or None.
      type: that parameter's quantization type, or None.
      sigmas: largest error, in standard deviations of the allowed rounding; inf if not finite.
      nmse: squared error over squared expectation, of the whole stage.
      nonfinite: how many values are NaN or infinite.
      token: position of the largest error.
      wrong: share of the judged values that depart.
      missing: positions of the prompt that the stage lacks.
      is_excused: departs by the plain model of rounding, and not by the careful one.
    """

    stage: str
    layer: int | None
    tensor: str | None
    type: str | None
    sigmas: float
    nmse: float
    nonfinite: int
    token: int
    wrong: float
    missing: int = 0
    is_excused: bool = False

    @property
    def departs(self) -> bool:
        """Whether the stage is wrong beyond rounding."""
        return self.missing > 0 or self.nonfinite > 0 or self.sigmas > MAX_SIGMAS

    @property
    def where(self) -> str:
        """The stage as llama.cpp writes it: "ffn_norm-12"."""
        return self.stage if self.layer is None else f"{self.stage}-{self.layer}"


class StageJudge(Expectations):
    """Expectations and judgements for one captured forward pass."""

    def keys(self) -> list[StageKey]:
        """The captured stages, in the order of the forward pass."""
        order = [(s.name, None) for s in INPUT_STAGES]
        order += [(s.name, layer) for layer in self.layers for s in LAYER_STAGES]
        order += [(s.name, None) for s in OUTPUT_STAGES]
        return [key for key in order if key in self.forward.stages]

    def judgements(self) -> Iterator[Judgement]:
        """Judges every captured stage, in the order of the forward pass."""
        for key in self.keys():
            yield self.judge(key)

    def side_by_side(self, count: int) -> list[Judgement]:
        """The same with ``count`` layers at a time."""
        groups = [list(keys) for _, keys in groupby(self.keys(), lambda key: key[1])]

        def judged(keys: list[StageKey]) -> list[Judgement]:
            own = copy(self)  # which keeps the weights of its layer
            return [own.judge(key) for key in keys]

        return list(chain.from_iterable(Workers(count).map(judged, groups)))

    def first_departure(self) -> Judgement | None:
        """The first stage that is wrong beyond rounding, or None."""
        return next((j for j in self.judgements() if j.departs), None)

    def judge(self, key: StageKey) -> Judgement:
        """Holds one captured stage against what its inputs make it: what departs, a second time with care."""
        judgement = self._judge(key)
        if self.careful or judgement.missing or not judgement.departs:
            return judgement
        careful = self._with_care(whole=judgement.nonfinite > 0)._judge(key)
        return replace(careful, is_excused=not careful.departs)

    def _with_care(self, whole: bool) -> "StageJudge":
        """The same judge with ``careful``; ``whole`` looks at every row and position."""
        fewer = {"max_rows": None, "max_tokens": None} if whole else {}
        judge = replace(self, careful=True, **fewer)
        judge.operand, judge.cache_rounding = self.operand, self.cache_rounding
        return judge

    def _judge(self, key: StageKey) -> Judgement:
        name, layer = key
        tensor = self.tensor_path(key)
        actual = self.forward.stages[key]
        facts = (name, layer, tensor, self.source.types[tensor].name if tensor else None)
        missing = len(self.token_ids) - len(actual)
        if missing:
            return Judgement(*facts, np.inf, np.inf, 0, len(actual), 1.0, missing)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            expected = self.expectation(key)
            sigmas = self.sigmas(key, expected)
            error = self._nmse(key, expected)
        nonfinite = int(np.size(actual) - np.isfinite(actual).sum())
        if nonfinite and self.careful:
            nonfinite = int(np.isinf(sigmas).sum())
        token = int(self.tokens[np.argmax(sigmas.reshape(len(sigmas), -1).max(axis=1))])
        wrong = float(np.mean(sigmas > MAX_SIGMAS))
        return Judgement(*facts, float(sigmas.max()), error, nonfinite, token, wrong)

    def sigmas(self, key: StageKey, expected: Expectation) -> np.ndarray:
        """Errors of a captured stage in standard deviations; inf where it is not finite.

        With ``careful``, 0 where no number is right: the stage's inputs are not finite, or float32 has
        no place for what they make.
        """
        actual = self.actual(key, expected)
        if key[0] in EXACT_STAGES:
            is_right = self._valid_choice(key)
            known = np.isfinite(self.value("ffn_moe_probs", key[1])).all(axis=-1, keepdims=True)
            return np.where(is_right | (self.careful & ~known), 0.0, np.inf)
        error = np.abs(actual - expected.value)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            sigmas = np.where(error == 0, 0.0, error / (expected.sigma + SMALLEST_NORMAL))
        is_finite = np.isfinite(actual) & np.isfinite(expected.value)
        if self.careful:
            is_in_range = np.isfinite(expected.sigma) & (np.abs(expected.value) <= FLOAT32_MAX)
            return np.where(is_in_range, np.where(is_finite, sigmas, np.inf), 0.0)
        return np.where(is_finite, sigmas, np.inf)

    def actual(self, key: StageKey, expected: Expectation) -> np.ndarray:
        """The captured values that ``expected`` speaks of."""
        value = self.value(*key)
        if expected.channels is None:
            return value.reshape(expected.value.shape)
        shape = (*expected.value.shape[:-1], -1)
        return value.reshape(shape)[..., expected.channels]

    def _nmse(self, key: StageKey, expected: Expectation) -> float:
        if key[0] in EXACT_STAGES:
            return 0.0
        return float(nmse(self.actual(key, expected).reshape(1, -1), expected.value.reshape(1, -1))[0])

"""The work of ``verify`` that is NumPy alone, in a process without threads that forks others; see ``crew``.

Pickles on stdin and stdout, of the parent and for it alone. First the path of the file, then requests: the
name of a function of ``TASKS`` and its arguments. An answer is ``(True, result)`` or ``(False, error)``. The
process ends when stdin does.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_moe_jax.convert.gguf_source import GGUFSource
from qwen3_moe_jax.convert.source import ModelSource
from qwen3_moe_jax.core.runner import Forward
from qwen3_moe_jax.machine.team import Team, array_nbytes, as_a_team, forked
from qwen3_moe_jax.parity.crew import receive, send
from qwen3_moe_jax.parity.file_check import rows_that_differ
from qwen3_moe_jax.parity.judge import Judgement, StageJudge
from qwen3_moe_jax.reference.model import PartsOnDemand, ReferenceRunner

NICENESS = 5
"""Compilers and whoever feeds a device go before: they are waited for, and these have time."""


def check_file(source: ModelSource, count: int) -> tuple[int, int]:
    """As ``rows_that_differ``, of the whole file."""
    paths = sorted(source.specs, key=source.tensor_nbytes, reverse=True)
    parts = forked(count, lambda number: rows_that_differ(source, paths[number::count]))
    different, weights = zip(*parts, strict=True)
    return sum(different), sum(weights)


def run_texts(
    source: ModelSource,
    count: int,
    texts: Sequence[np.ndarray],
    dtype: str,
    capture: Sequence[str],
    logits: str,
) -> list[tuple[np.ndarray, Mapping[Any, np.ndarray]]]:
    """Runs texts through the reference.

    Args:
      dtype: that it computes in.
      logits: path of a file of float32 [all tokens, V], to be filled.

    Returns:
      Of each text the expert ids and the stages that are captured.
    """
    tokens, vocab = sum(map(len, texts)), source.config.vocab_size
    room = np.memmap(logits, np.float32, "r+", shape=(tokens, vocab))
    ends = np.cumsum([len(text) for text in texts])
    rooms = [room[end - len(text) : end] for end, text in zip(ends, texts, strict=True)]

    def run(team: Team) -> list[Forward]:
        options = {"dtype": np.dtype(dtype).type, "resident": PartsOnDemand(source), "workers": team}
        runner = ReferenceRunner(source, **options)
        return runner.forwards(texts, rooms, capture=tuple(capture) if team.number == 0 else ())

    def small(team: Team) -> list[Any]:
        return [(found.expert_ids, found.stages) for found in run(team)]

    return as_a_team(count, 2 * layer_nbytes(source, texts, np.dtype(dtype)), small)


def layer_nbytes(source: ModelSource, texts: Sequence[np.ndarray], dtype: np.dtype) -> int:
    """Bytes of all arrays that a layer's operations fill, for all texts."""
    c = source.config
    heads, key_heads = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    widths = [c.hidden_size] * 5 + [heads] * 4 + [key_heads] * 4 + [c.num_experts]
    widths += [c.num_experts_per_tok * width for width in (*[c.moe_intermediate_size] * 3, c.hidden_size)]
    return sum(array_nbytes((len(text), width), dtype) for text in texts for width in widths)


def judge_stages(
    source: ModelSource,
    count: int,
    facts: Mapping[str, object],
    token_ids: np.ndarray,
    forward: Forward,
    layers: Sequence[int],
) -> list[Judgement]:
    """As ``StageJudge.judgements``."""
    weights = PartsOnDemand(source)
    judge = StageJudge(source, facts, token_ids, forward, layers=layers, tensors=weights)
    groups = [list(keys) for _, keys in groupby(judge.keys(), lambda key: key[1])]

    def judged(number: int) -> list[list[Judgement]]:
        return [[judge.judge(key) for key in keys] for keys in groups[number::count]]

    parts = forked(count, judged)
    found = [parts[i % count][i // count] for i in range(len(groups))]
    return list(chain.from_iterable(found))


TASKS = {task.__name__: task for task in (check_file, run_texts, judge_stages)}


def main() -> None:
    """Answers requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.nice(NICENESS)
    try:
        path, count = receive(sys.stdin.buffer)
        source = GGUFSource(Path(path), threads=1)
        while True:
            name, arguments = receive(sys.stdin.buffer)
            send(answers, _answer(source, count, name, arguments))
    except EOFError:
        return


def _answer(source: ModelSource, count: int, name: str, arguments: Mapping[str, Any]) -> tuple[bool, Any]:
    try:
        return True, TASKS[name](source, count, **arguments)
    except Exception as error:  # it is the parent's: it is raised there
        return False, error


if __name__ == "__main__":
    main()

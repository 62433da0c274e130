"""Metrics on cases that can be worked out by hand."""

import math

import numpy as np
import pytest

from qwen3_moe_jax.parity import metrics

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 1.0),
        ([3.0, 4.0], [4.0, -3.0], 0.0),
        ([1.0, 0.0], [-2.0, 0.0], -1.0),
        ([3.0, 4.0], [4.0, 3.0], 24 / 25),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
        ([1.0, NAN], [1.0, 1.0], -1.0),
        ([1.0, 1.0], [INF, 1.0], -1.0),
    ],
)
def test_cosine(a, b, expected):
    assert metrics.cosine(np.array([a]), np.array([b]))[0] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("actual", "expected", "value"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 3.0], [1.0, 2.0], 1 / 5),
        ([0.0, 0.0], [3.0, 4.0], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], INF),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, INF], INF),
    ],
)
def test_nmse(actual, expected, value):
    assert metrics.nmse(np.array(actual), np.array(expected)) == pytest.approx(value)


def test_kl_of_a_fair_and_a_biased_coin():
    fair, biased = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert metrics.kl_divergence(fair, biased)[0] == pytest.approx(expected)
    assert metrics.kl_divergence(fair + 7, fair)[0] == pytest.approx(0, abs=1e-15)  # logits have no level
    assert metrics.kl_divergence(fair, np.array([[NAN, 0.0]]))[0] == INF


def test_kl_of_far_logits_is_not_nan():
    assert metrics.kl_divergence(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]]))[0] == pytest.approx(1e4)


def test_top1():
    expected = np.array([[0, 1, 2], [3, 1, 2], [0, 1, 2]], float)
    actual = np.array([[5, 6, 7], [1, 3, 2], [0, 1, NAN]])
    assert metrics.top1_agrees(expected, actual).tolist() == [True, False, False]


def test_expert_overlap_ignores_order():
    expected, actual = np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), np.array([[3, 2, 1, 0], [0, 1, 8, 9]])
    assert metrics.expert_overlap(expected, actual).tolist() == [1.0, 0.5]


def test_router_margin():
    logits = np.array([[5.0, 1.0, 4.0, 3.5], [2.0, 2.0, 2.0, 2.0]])
    assert metrics.router_margin(logits, 2).tolist() == [0.5, 0.0]
    assert metrics.router_margin(logits, 4).tolist() == [INF, INF]
    assert metrics.top_experts(logits, 2).tolist() == [[0, 2], [0, 1]]


def test_shapes_that_differ_are_refused():
    for function in (metrics.cosine, metrics.nmse, metrics.kl_divergence, metrics.top1_agrees):
        with pytest.raises(ValueError, match="shapes"):
            function(np.zeros((2, 3)), np.zeros((1, 3)))

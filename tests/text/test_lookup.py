"""Prompt lookup on the host: which draft a text gives, and when one is tried at all."""

import random

import pytest

from qwen3_moe_jax.core.lookup import (
    DRAFTS,
    MAX_PLACES,
    MIN_MATCH,
    Drafts,
    Gate,
    PromptLookup,
    Repeats,
    size_of,
)

PHRASE = list(range(100, 100 + MIN_MATCH))


def test_a_draft_is_what_followed_the_same_tokens():
    text = Repeats([1, *PHRASE, 5, 6, 7, 8, 9, 2, *PHRASE])
    assert text.draft(3) == [5, 6, 7]
    assert text.draft(7) == [5, 6, 7, 8, 9, 2, 100]
    assert text.draft(0) == []


def test_fewer_tokens_alike_give_no_draft():
    assert Repeats([1, *PHRASE[1:], 5, 2, *PHRASE[1:]]).draft(3) == []
    assert Repeats(PHRASE).draft(3) == []
    assert Repeats().draft(3) == []


def test_the_latest_place_counts_unless_an_earlier_one_is_alike_for_longer():
    both = [1, *PHRASE, 5, 2, *PHRASE, 6]
    assert Repeats([*both, 3, *PHRASE]).draft(1) == [6]
    assert Repeats([*both, 1, *PHRASE]).draft(1) == [5]


def test_a_copy_goes_on_from_its_place_however_often_the_words_came_since():
    """The place of the last draft is compared, too, when later ones have put it out of sight."""
    begin = list(range(200, 200 + MIN_MATCH))
    later = [token for i in range(MAX_PLACES + 1) for token in (90 + i, *PHRASE, 70 + i)]
    tokens = [*begin, *PHRASE, 60, 61, *later, *begin]
    text = Repeats(tokens)
    assert text.draft(3) == PHRASE[:3]
    text.extend(PHRASE)
    assert text.draft(2) == [60, 61]
    assert Repeats([*tokens, *PHRASE]).draft(1) == [70 + MAX_PLACES]


def test_a_loop_goes_on_past_the_end_of_the_text():
    text = Repeats([1, 2, 3] * 5)
    assert text.draft(7) == [1, 2, 3, 1, 2, 3, 1]


def test_drafts_are_what_a_plain_search_finds():
    rng = random.Random(20261128)
    for _ in range(50):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(10, 60))]
        draft = Repeats(tokens).draft(1)
        ends = range(MIN_MATCH, len(tokens))
        alike = [end for end in ends if tokens[end - MIN_MATCH : end] == tokens[-MIN_MATCH:]]
        assert bool(draft) == bool(alike)
        assert not draft or draft[0] in {tokens[end] for end in alike}


def test_what_is_written_is_part_of_the_text():
    lookup = PromptLookup()
    lookup.begin([1, *PHRASE, 5, 6, 7, 8])
    lookup.wrote([2], 0.0)
    assert lookup.draft(9) == []
    lookup.wrote(PHRASE, 0.0)
    assert lookup.draft(9) == [5, 6, 7]
    lookup.tried([5, 6, 7], [5, 6, 9], 0.0)
    assert lookup.drafts == Drafts(steps=1, drafted=3, accepted=2)
    assert lookup.drafts.in_words() == "drafts: 2 of 3 tokens right"


@pytest.mark.parametrize(("tokens", "right"), [([9], 0), ([5, 9], 1), ([5, 6, 7, 8], 3), ([5, 6], 2)])
def test_right_tokens_are_counted_also_where_the_text_ends_in_a_draft(tokens, right):
    lookup = PromptLookup()
    lookup.begin([1, 2])
    lookup.tried([5, 6, 7], tokens, 0.0)
    assert lookup.drafts.accepted == right


def test_drafts_grow_while_they_are_right_and_shrink_when_they_are_not():
    gate = Gate()
    assert gate.drafts() == DRAFTS[0]
    gate.tried(3, 3, 0.0)
    assert gate.drafts() == DRAFTS[-1]
    gate.tried(7, 3, 0.0)
    assert gate.drafts() == DRAFTS[0]


def test_the_gate_closes_after_misses_and_opens_again_later():
    gate, tries = Gate(), 0
    while gate.drafts():
        gate.tried(gate.drafts(), 0, 0.0)
        tries += 1
    assert tries == 2
    written = 0
    while not gate.drafts():
        gate.wrote(8, 0.1)
        written += 8
    assert 50 <= written <= 200


@pytest.mark.parametrize("cost", [1.5, 2.0, 3.0])
def test_what_never_repeats_costs_less_than_two_percent(cost):
    """Each draft is wrong and is tried as soon as the gate lets it: the account bounds what that costs."""
    gate, steps, tokens = Gate(), 0.0, 0
    while tokens < 2000:
        if size := gate.drafts():
            steps, tokens = steps + cost, tokens + 1
            gate.tried(size, 0, cost)
        else:
            steps, tokens = steps + 1, tokens + 1
            gate.wrote(1, 1.0)
    assert steps <= 1.02 * tokens


def test_success_long_ago_does_not_pay_for_many_misses():
    gate = Gate()
    for _ in range(1000):
        gate.tried(7, 7, 0.0)
    lost = 0.0
    while size := gate.drafts():
        lost += gate.costs[size] - 1
        gate.tried(size, 0, 0.0)
    assert lost <= Gate.MAXIMUM


def test_a_step_that_costs_more_than_all_its_tokens_is_not_tried():
    gate = Gate()
    gate.wrote(10, 10.0)
    for _ in range(20):
        gate.tried(3, 3, 9.0)  # nine plain steps for four tokens
    assert gate.costs[3] > 4
    assert gate.drafts() != 3


def test_one_measurement_on_a_busy_machine_does_not_close_the_gate():
    gate = Gate()
    gate.wrote(10, 10.0)
    gate.tried(3, 3, 1000.0)
    assert gate.costs[3] <= 2.5
    assert gate.drafts()


def test_sizes_are_those_of_the_programs():
    assert [size_of(n) for n in range(1, 8)] == [3, 3, 3, 7, 7, 7, 7]

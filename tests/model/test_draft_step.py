"""Prompt lookup in the jax backend: the same tokens with drafts as without, whatever is right of them."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_moe_jax.api import Model
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.errors import BackendUnavailableError, NumericalError
from qwen3_moe_jax.core.lookup import DRAFTS, PromptLookup
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import consecutive
from qwen3_moe_jax.jax_backend.draft_step import write_draft
from qwen3_moe_jax.jax_backend.kv_cache import KVCache, whole_tiles
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.session_programs import Session
from qwen3_moe_jax.machine.kernels import NATIVE
from qwen3_moe_jax.reference import ReferenceRunner
from qwen3_moe_jax.testing.random_models import SMALL, write_random_gguf

GREEDY = Sampling(temperature=0)
SAMPLINGS = {
    "greedy": GREEDY,
    "greedy with penalties": Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.4),
    "few candidates": Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5),
    "all candidates": Sampling(temperature=1.0, top_k=0, min_p=0.02, seed=6),
    "penalties": Sampling(temperature=0.9, repetition_penalty=1.2, presence_penalty=0.7, seed=7),
}
WORDS = "def add(a, b):\n    return a + b\n\n"


class Told(PromptLookup):
    """Drafts of a known text, each ``every``-th token of which is told wrong; the gate is always open."""

    def __init__(self, text: Sequence[int], every: int = 0, size: int = DRAFTS[-1]):
        super().__init__()
        self._text, self._every, self._size, self._at = list(text), every, size, 0

    def draft(self, maximum: int) -> list[int]:
        places = range(self._at, min(self._at + min(self._size, maximum), len(self._text)))
        wrong = lambda i: self._every and i % self._every == self._every - 1
        return [self._text[i] ^ 1 if wrong(i) else self._text[i] for i in places]

    def wrote(self, tokens: Sequence[int], seconds: float) -> None:
        self._at += len(tokens)
        super().wrote(tokens, seconds)

    def tried(self, draft: Sequence[int], tokens: Sequence[int], seconds: float) -> None:
        self._at += len(tokens)
        super().tried(draft, tokens, seconds)


@pytest.fixture(scope="module")
def runner(source, native) -> JaxRunner:
    return JaxRunner(source, max_context=384, kernels=NATIVE)


@pytest.fixture(scope="module")
def model(source, runner) -> Model:
    return Model(source, runner)


def stream(runner, ids, lookup=None, sampling=GREEDY, max_tokens=48, **options) -> list[int]:
    return list(runner.stream(ids, max_tokens=max_tokens, sampling=sampling, lookup=lookup, **options))


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_tokens_at_once_have_the_bits_of_one_after_the_other(runner, golden, rows):
    """Logits, experts and cache, from an empty cache and behind a prompt."""
    ids = np.resize(golden["ids0"], 160)
    for start in (0, 130):
        cache = KVCache.create(runner.config, 1, whole_tiles(256))
        if start:
            cache = runner.decoder.read(runner.params, ids[None, :start], jnp.array([0]), cache).cache
        begin, ends = jnp.array([start], jnp.int32), jnp.array([start + rows], jnp.int32)
        token_ids = jnp.asarray(ids[None, start : start + rows])
        together = consecutive.run(runner.decoder, runner.params, token_ids, begin, ends, cache)
        for row in range(rows):
            alone = runner.decoder.step(runner.params, token_ids[:, row : row + 1], begin + row, cache)
            np.testing.assert_array_equal(together.logits[:, row], alone.logits[:, 0], str(row))
            np.testing.assert_array_equal(together.expert_ids[:, :, row], alone.expert_ids[:, :, 0])
            cache = alone.cache
        np.testing.assert_array_equal(together.cache.k, cache.k)
        np.testing.assert_array_equal(together.cache.v, cache.v)


@pytest.mark.parametrize("every", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_same_tokens_with_drafts_as_without(runner, golden, sampling, every):
    """All right, none, or every few; and what a wrong one left in the cache is overwritten."""
    plain = stream(runner, golden["ids0"], sampling=sampling)
    for size in DRAFTS:
        lookup = Told(plain, every, size)
        assert stream(runner, golden["ids0"], lookup, sampling) == plain
        assert lookup.drafts.steps > 0
        assert (lookup.drafts.accepted > 0) == (every != 1)
        assert (lookup.drafts.accepted < lookup.drafts.drafted) == (every > 0)


@pytest.mark.parametrize("seed", range(4))
def test_repeated_text_is_drafted_and_the_answer_is_the_plain_one(runner, model, seed):
    """The drafter's own drafts and its own gate: at least some are right."""
    ids = model.tokenizer.encode(WORDS * 3 + f"# {seed}\n" + WORDS * 2)
    lookup = PromptLookup()
    plain = stream(runner, ids, max_tokens=96)
    assert stream(runner, ids, lookup, max_tokens=96) == plain
    assert lookup.drafts.accepted > 20
    sampling = Sampling(temperature=0.6, top_k=20, seed=seed)
    plain = stream(runner, ids, sampling=sampling)
    assert stream(runner, ids, PromptLookup(), sampling) == plain


def test_prose_without_repeats_is_not_drafted(runner, golden):
    lookup = PromptLookup()
    plain = stream(runner, golden["ids1"], sampling=Sampling(temperature=1.0, top_k=0, seed=1))
    assert stream(runner, golden["ids1"], lookup, Sampling(temperature=1.0, top_k=0, seed=1)) == plain
    assert lookup.drafts.steps == 0


def test_a_text_ends_inside_a_draft_where_it_would_without(runner, golden):
    """At each length, at a stop token at each place, and at the end of the context."""
    prompt = golden["ids0"]
    plain = stream(runner, prompt, max_tokens=24)
    for count in range(1, 12):
        assert stream(runner, prompt, Told(plain), max_tokens=count) == plain[:count]
    for stop in dict.fromkeys(plain[1:16]):
        expected = stream(runner, prompt, stop_ids={stop}, max_tokens=24)
        assert expected == plain[: plain.index(stop)]
        assert stream(runner, prompt, Told(plain), stop_ids={stop}, max_tokens=24) == expected
    for room in range(1, 11):
        long = np.resize(prompt, runner.max_context - room)
        plain = stream(runner, long, max_tokens=100)
        lookup = Told(plain)
        assert stream(runner, long, lookup, max_tokens=100) == plain
        assert len(plain) == room
        assert (lookup.drafts.accepted > 0) == (room > 2)


def test_the_next_stream_goes_on_from_what_a_draft_left_in_the_cache(runner, golden):
    prompt = golden["ids0"].tolist()
    answer = stream(runner, prompt, Told(stream(runner, prompt), every=3))
    more = [*prompt, *answer, *golden["ids1"][:5].tolist()]
    again = stream(runner, more, reuse=True)
    assert runner.reused_tokens >= len(prompt) + len(answer) - 1
    fresh = stream(runner, [*prompt, 1], max_tokens=1) and stream(runner, more)
    assert again == fresh


def test_a_stream_that_is_given_up_in_a_draft_lets_the_next_one_in(runner, golden):
    plain = stream(runner, golden["ids0"])
    half = runner.stream(golden["ids0"], max_tokens=48, sampling=GREEDY, lookup=Told(plain))
    assert [next(half) for _ in range(4)] == plain[:4]
    half.close()
    assert stream(runner, golden["ids0"]) == plain


def test_logits_that_are_not_finite_end_a_draft_at_their_position(source, native, golden):
    """The token whose embedding is broken is written; what comes after it cannot be."""
    runner = JaxRunner(source, max_context=256, kernels=NATIVE)
    plain = stream(runner, golden["ids0"], max_tokens=12)
    broken = next(token for token in plain[3:] if plain.index(token) >= 3 and token not in golden["ids0"])
    embed = runner.params["embed_tokens"]
    table = np.asarray(embed.arrays["d"])
    rows = table.reshape(embed.shape[0], -1).copy()
    rows[broken] = np.inf
    arrays = {**embed.arrays, "d": jnp.asarray(rows.reshape(table.shape))}
    runner.params["embed_tokens"] = type(embed)(arrays, embed.type, embed.layout)
    errors, texts = [], []
    for lookup in (None, Told(plain)):
        text: list[int] = []
        with pytest.raises(NumericalError) as error:
            text.extend(runner.stream(golden["ids0"], max_tokens=12, sampling=GREEDY, lookup=lookup))
        errors.append(str(error.value))
        texts.append(text)
    assert errors[0] == errors[1]


def test_pieces_of_characters_come_whole_and_a_stop_string_cuts_a_draft(model):
    """Letters of several tokens, from steps that write several tokens."""
    prompt = "日本語とエスペラント: ŝanĝo 🙂🙃 " * 6
    plain = list(model.stream(prompt, max_tokens=60, temperature=0))
    assert list(model.stream(prompt, max_tokens=60, temperature=0, prompt_lookup=True)) == plain
    code = WORDS * 4
    whole = model.generate(code, max_tokens=60, temperature=0)
    stop = whole.text[20:24]
    cut = model.generate(code, max_tokens=60, temperature=0, stop=stop)
    ours = model.generate(code, max_tokens=60, temperature=0, stop=stop, prompt_lookup=True)
    assert ours == cut
    assert (ours.finish_reason, ours.tokens) == ("stop", cut.tokens)
    assert ours.drafts is not None
    assert ours.drafts.accepted > 0
    assert cut.drafts is None


def test_a_session_has_the_programs_where_they_are_asked_for(runner):
    session = runner._session
    labels = lambda s: [wanted.label for wanted in s.programs()]
    assert [label for label in labels(session) if "draft" in label] == []
    asked = Session(session.decoder, session.params, session.capacity, session.cache_dtype, drafts=True)
    assert [label for label in labels(asked) if "draft" in label] == [f"drafts of {n} tokens" for n in DRAFTS]


def test_one_program_for_each_size_whatever_the_sampling(runner, golden):
    stream(runner, golden["ids0"], Told(stream(runner, golden["ids0"])))
    before = write_draft.count()
    for sampling in SAMPLINGS.values():
        plain = stream(runner, golden["ids1"], sampling=sampling)
        for size in DRAFTS:
            stream(runner, golden["ids1"], Told(plain, size=size), sampling)
    assert write_draft.count() - before <= 1


@pytest.mark.parametrize("options", [{"kernels": "xla"}, {"kernels": NATIVE, "cache_dtype": "int8"}])
def test_what_cannot_keep_the_bits_refuses_with_one_line(source, native, golden, options):
    with pytest.raises(BackendUnavailableError, match="prompt lookup cannot keep the answer's bits") as error:
        JaxRunner(source, max_context=64, prompt_lookup=True, **options)
    assert "\n" not in str(error.value)
    runner = JaxRunner(source, max_context=64, **options)
    with pytest.raises(BackendUnavailableError, match="prompt lookup"):
        runner.stream(golden["ids0"], max_tokens=4, sampling=GREEDY, lookup=PromptLookup())
    assert len(stream(runner, golden["ids0"], max_tokens=2)) == 2


def test_other_backends_refuse_it(source, golden):
    runner = ReferenceRunner(source, max_context=64)
    with pytest.raises(BackendUnavailableError, match="the reference backend has no prompt lookup"):
        runner.stream(golden["ids0"], max_tokens=4, sampling=GREEDY, lookup=PromptLookup())


def test_other_types_and_heads(tmp_path, native):
    """Random models of other mixes: experts chosen from many, types of several layers."""
    for mix, seed in (("q4_k_m", 1), ("q8_0", 2)):
        path = tmp_path / f"{mix}.gguf"
        write_random_gguf(path, SMALL, mix=mix, seed=seed)
        with open_model(path) as source:
            runner = JaxRunner(source, max_context=128, kernels=NATIVE)
            ids = np.random.default_rng(seed).integers(0, source.config.vocab_size, 20)
            plain = stream(runner, ids)
            lookup = Told(plain, every=4)
            assert stream(runner, ids, lookup) == plain
            assert lookup.drafts.accepted > 0
            runner.close()

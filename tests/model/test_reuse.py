"""A stream that goes on from what the cache holds: the same text, fewer tokens read."""

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.batching import Batch
from qwen3_moe_jax.jax_backend.requests import shared_tokens

MAX_TOKENS = 24


def run(runner, prompt, **options):
    return list(runner.stream(prompt, max_tokens=MAX_TOKENS, sampling=Sampling(), **options))


def test_what_two_sequences_share():
    assert shared_tokens([1, 2, 3], [1, 2, 3, 4, 5]) == 3
    assert shared_tokens([1, 2, 3], [1, 2, 3]) == 2
    assert shared_tokens([1, 9, 3], [1, 2, 3]) == 1
    assert shared_tokens([], [1]) == 0


def test_the_next_turn_reads_only_what_is_new(jax_runner, golden):
    prompt = golden["ids1"].tolist()
    first = run(jax_runner, prompt)
    turn = [*prompt, *first, *prompt[:7]]
    fresh = run(jax_runner, turn)
    assert jax_runner.reused_tokens == 0
    run(jax_runner, prompt)
    again = run(jax_runner, turn, reuse=True)
    assert jax_runner.reused_tokens >= len(prompt) + len(first) - 1
    assert again == fresh


def test_a_stream_that_was_given_up_leaves_what_it_wrote(jax_runner, golden):
    prompt = golden["ids1"].tolist()
    whole = run(jax_runner, prompt)
    stream = jax_runner.stream(prompt, max_tokens=MAX_TOKENS, sampling=Sampling())
    said = [next(stream) for _ in range(9)]
    stream.close()
    turn = [*prompt, *said, *prompt[:7]]
    again = run(jax_runner, turn, reuse=True)
    assert jax_runner.reused_tokens >= len(prompt)
    assert again == run(jax_runner, turn)
    assert said == whole[:9]


def test_another_prompt_reuses_only_what_it_shares(jax_runner, golden):
    prompt = golden["ids1"].tolist()
    other = [*prompt[:5], prompt[5] ^ 1, *prompt[6:]]
    fresh = run(jax_runner, other)
    run(jax_runner, prompt)
    assert run(jax_runner, other, reuse=True) == fresh
    assert jax_runner.reused_tokens == 5


def test_a_stream_that_begins_while_another_leaves_its_batch_writes_its_own_text(
    jax_runner, golden, monkeypatch
):
    """As another thread could: between the two halves of what a stream leaves to the next one."""
    prompt = golden["ids1"].tolist()
    turn = [*prompt, *prompt[:7]]
    alone = run(jax_runner, turn)
    stream = jax_runner.stream(prompt, max_tokens=MAX_TOKENS, sampling=Sampling())
    next(stream)
    found = []
    free_all = Batch.free_all

    def meanwhile(batch):
        monkeypatch.setattr(Batch, "free_all", free_all)
        found.append(run(jax_runner, turn, reuse=True))
        free_all(batch)

    monkeypatch.setattr(Batch, "free_all", meanwhile)
    stream.close()
    assert found == [alone]


# The context that fits


class Free:
    def __init__(self, nbytes):
        self.nbytes, self.where = nbytes, loader.MAIN_MEMORY


def test_the_context_is_what_memory_and_the_file_allow(monkeypatch):
    with open_model(loader.embedded_model()) as source:
        maximum, plan = 4096, loader.MemoryPlan.of(source, 4096, 4)
        monkeypatch.setattr(loader, "DEFAULT_CONTEXT", 256)
        base, token = plan.weights + plan.working, plan.cache / 4096
        for tokens, expected in ((1e5, maximum), (2 * 3200, 2048), (2 * 1300, 256), (1024 + 200, 128)):
            monkeypatch.setattr(loader, "main_memory", lambda n=tokens: Free(int(base + n * token) + 1))
            assert loader.fitting_context(source, "reference") == expected
        assert loader.fitting_context(source, "wgpu") == 256
        monkeypatch.setattr(loader, "main_memory", lambda: Free(None))
        assert loader.fitting_context(source, "reference") == 256
        monkeypatch.setattr(loader, "main_memory", lambda: Free(1))
        assert loader.fitting_context(source, "reference") == 256  # the plan's check says what is wrong

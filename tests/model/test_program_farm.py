"""Programs that other processes compile: the same bits, and nothing but time is lost when they fail."""

import json
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import pytest

from qwen3_moe_jax import loader
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import forward, program_farm, programs, spare_workers
from qwen3_moe_jax.jax_backend.forward import forward_chunk
from qwen3_moe_jax.jax_backend.preparation import Preparation
from qwen3_moe_jax.jax_backend.program_farm import Abandoned, Farm, asking, workers_for
from qwen3_moe_jax.jax_backend.program_request import decode, encode
from qwen3_moe_jax.jax_backend.program_store import ProgramStore
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.session_programs import Session
from qwen3_moe_jax.jax_backend.settings import own_settings
from qwen3_moe_jax.parity.evidence import BATCHES, DECODED_TOKENS, RUNS, STAGE_CHUNK, Evidence, Oracle
from qwen3_moe_jax.parity.gate import TOKENS, first_forward, layers_option
from qwen3_moe_jax.parity.judge import FUSED_STAGES
from qwen3_moe_jax.testing.random_models import SMALL
from qwen3_moe_jax.testing.small_programs import doubled

ROOT = Path(__file__).parents[2]
CONTEXT = 768
WORKER = [sys.executable, "-m", "qwen3_moe_jax.jax_backend.program_worker"]
GREEDY = Sampling(temperature=0)


@pytest.fixture
def farm(monkeypatch):
    """A farm of its own, whose workers end with the test."""
    farm = Farm()
    monkeypatch.setattr(program_farm, "_farm", farm)
    yield farm
    farm.close()


def written(runner):
    return list(runner.stream([3, 1, 4, 1, 5], max_tokens=6, sampling=GREEDY))


def test_programs_of_workers_are_found_and_give_the_same_bits(f16_file, store, farm, monkeypatch):
    """The key is the same in both processes, or the worker would refuse the request."""
    with open_model(f16_file) as source:
        alone = JaxRunner(source, max_context=CONTEXT, kernels="xla")
        expected, logits = written(alone), alone.forward([3, 1, 4, 1, 5]).logits
        alone.close()
        programs.forget()
        for path in store.folder.iterdir():
            path.unlink()

        asked, taken = [], []
        make, take = Farm.make, programs.Program._is_made_elsewhere
        monkeypatch.setattr(
            programs.Program, "_is_made_elsewhere", lambda *args: taken.append(take(*args)) or taken[-1]
        )
        monkeypatch.setattr(Farm, "make", lambda *args: asked.append(make(*args)) or asked[-1])
        monkeypatch.setenv(spare_workers.VARIABLE, "1")
        runner = JaxRunner(source, max_context=CONTEXT, kernels="xla", first_prompt=5)
        assert written(runner) == expected
        np.testing.assert_array_equal(runner.forward([3, 1, 4, 1, 5]).logits, logits)
        runner.close()
    assert True in asked
    assert sum(taken) >= sum(asked), "what another process has made was compiled once more"
    assert programs.trouble() == []


def test_arguments_that_were_sent_have_the_same_key(f16_file, store):
    with open_model(f16_file) as source, own_settings():
        runner = JaxRunner(source, max_context=CONTEXT, kernels="xla")
        session = replace(runner._session, slots=4)
        for wanted in [session.forward(*first_forward(source)), *session.programs()]:
            static, dynamic = wanted.program._split((), wanted.arguments)
            sent = json.loads(json.dumps([encode(static), encode(dynamic)]))
            again = [decode(one) for one in sent]
            assert wanted.program.disk_key(*again) == wanted.program.disk_key(static, dynamic), wanted.label
        runner.close()


def request_for(n: int) -> dict[str, Any]:
    with own_settings():
        found = doubled._request(doubled._split((jax.ShapeDtypeStruct((n,), np.float32),), {}))
    assert found is not None
    return found


def hello_of(store) -> dict[str, Any]:
    settings = {n: v for n, v in jax.config.values.items() if program_farm._is_plain(n, v)}
    return {"store": str(store.folder), "max_bytes": store.max_bytes, "settings": settings}


def test_a_worker_refuses_foreign_requests_and_goes_on(store, farm):
    good = request_for(3)
    hostile = [
        {**good, "program": "os:system"},
        {**good, "program": "qwen3_moe_jax.jax_backend.program_request:decode"},
        {**good, "dynamic": encode({"x": np.zeros(4, np.float32)})},
        {**good, "dynamic": {"object": ["subprocess:Popen", {"args": ["true"]}]}},
        {"nothing": 1},
    ]
    worker = program_farm._Worker(hello_of(store), None)
    try:
        assert worker.start() == ""
        said = [worker.ask(request, 60) for request in hostile]
        assert "not of this package" in said[0]
        assert "is no program" in said[1]
        assert "another program" in said[2]
        assert "not of this package" in said[3]
        assert "KeyError" in said[4]
        assert not store.folder.exists()
        assert worker.ask(good, 60) == ""
        assert store.has(good["key"])
        with own_settings():
            assert doubled.load(np.arange(3, dtype=np.float32))
            np.testing.assert_array_equal(doubled(np.arange(3, dtype=np.float32)), [0, 2, 4])
    finally:
        worker.end()


def test_two_processes_that_ask_for_the_same_program_both_find_it(store, farm):
    other, request = Farm(), request_for(5)
    found = []
    try:
        for one in (farm, other):
            one.start(1, hello_of(store))
        make = lambda one: found.append(one.make(lambda: request))
        threads = [threading.Thread(target=make, args=(one,)) for one in (farm, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        other.close()
    assert found == [True, True]
    assert store.get(request["key"]) is not None
    assert not list(store.folder.glob("*.part"))


def fake(code: str) -> list[str]:
    """A worker that answers the first line, and then does this."""
    start = (
        "import json, sys, time\n"
        "hear = sys.stdin.readline\n"
        "say = lambda error: print(json.dumps({'error': error}), flush=True)\n"
        "hear(), say('')\n"
    )
    return [sys.executable, "-S", "-c", start + code]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.exit(3)", "a process ended"),
        ("hear(), sys.exit(3)", "a process ended"),
        ("hear(), print('something else', flush=True)", "a process ended"),
        ("hear(), time.sleep(600)", "a process did not answer for 1 s"),
        ("hear(), say('MemoryError'), time.sleep(600)", "MemoryError"),
    ],
)
def test_what_a_worker_does_not_make_is_compiled_here(store, farm, code, words, monkeypatch):
    monkeypatch.setattr(program_farm, "MAKE_SECONDS", 1.0)
    farm.start(1, {}, fake(code))
    with own_settings(), asking(is_over=lambda: False, may_be_here=False):
        np.testing.assert_array_equal(doubled(np.arange(4, dtype=np.float32)), [0, 2, 4, 6])
    assert farm.trouble == [f"a program was not compiled beside the others: {words}"]
    assert programs.trouble() == farm.trouble
    assert store.nbytes()


def test_a_worker_that_cannot_start_costs_nothing(store, farm):
    farm.start(2, {}, ["/nowhere/python"])
    assert farm.count == 0
    with own_settings():
        doubled(np.arange(6, dtype=np.float32))
    assert len(farm.trouble) == 1


def test_who_wants_a_program_no_more_does_not_wait_for_it(store, farm):
    farm.start(1, {}, fake("hear(), time.sleep(600)"))
    with own_settings(), asking(is_over=lambda: True, may_be_here=False), pytest.raises(Abandoned):
        doubled(np.arange(7, dtype=np.float32))


def test_the_first_program_is_compiled_here_and_others_meanwhile_elsewhere(farm):
    farm.start(1, {}, fake("time.sleep(600)"))
    with farm.turn() as first, farm.turn() as second:
        assert (first, second) == (True, False)
    with asking(is_over=lambda: False, may_be_here=False), farm.turn() as elsewhere:
        assert not elsewhere
    with farm.turn() as again:
        assert again
    farm.close()
    with farm.turn() as first, farm.turn() as second:
        assert (first, second) == (True, True)


def test_idle_workers_end(farm, monkeypatch):
    farm.start(1, {}, fake("time.sleep(600)"))
    [worker] = farm._workers
    while worker.is_busy:  # until its thread has heard that it is ready
        threading.Event().wait(0.01)
    ended, end = [], program_farm._Worker.end
    monkeypatch.setattr(
        program_farm._Worker, "end", lambda self: ended.append(threading.current_thread()) or end(self)
    )
    farm.end_idle()
    assert threading.current_thread() in ended, "it is gone when this returns, whenever its thread ends"
    assert farm.count == 0
    assert worker._process.poll() is not None

    monkeypatch.setattr(program_farm, "IDLE_SECONDS", 0.0)
    farm.start(1, {}, fake("time.sleep(600)"))
    [worker] = farm._workers
    worker._process.wait(60)
    assert farm.trouble == []


def test_a_worker_ends_with_its_parent():
    parent = (
        "import subprocess, sys, time\n"
        f"worker = subprocess.Popen({WORKER!r}, stdin=subprocess.PIPE)\n"
        "print(worker.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    worker.wait(60)  # or psutil.TimeoutExpired


@pytest.mark.parametrize("follow", [True, False])
def test_with_spares_this_process_compiles_nothing(f16_file, store, farm, monkeypatch, follow):
    """They start before the network is planned; programs of other sizes are asked for after the load."""
    order: list[Any] = []
    of = Session.of
    monkeypatch.setenv(spare_workers.VARIABLE, "5")
    monkeypatch.setattr(spare_workers, "count", lambda: 5)
    monkeypatch.setattr(Farm, "start", lambda self, count, hello: order.append(f"start {count}"))
    monkeypatch.setattr(Farm, "count", 5)
    monkeypatch.setattr(Session, "of", lambda *args, **kwargs: order.append("plan") or of(*args, **kwargs))
    begin = lambda self, first, *, compiles, may_be_here=True: order.append((compiles, may_be_here))
    monkeypatch.setattr(Preparation, "begin", begin)
    monkeypatch.setattr(
        Preparation, "begin_elsewhere", lambda self, more: order.append({w.label for w in more})
    )
    with open_model(f16_file) as source, own_settings():
        weights = lambda done, total: order.append("weights")
        runner = JaxRunner(
            source, max_context=CONTEXT, kernels="xla", first_prompt=5, progress=weights, others_follow=follow
        )
        assert runner.preparation.goes_on is follow
        runner.close()
    order = [what for i, what in enumerate(order) if what != "weights" or order[i - 1] != what]
    rest = [{"tokens", *(f"prompts of {n} tokens" for n in (16, 128, 512))}] if follow else []
    assert order == ["start 5", "plan", (True, False), (False, True), "weights", *rest]


def test_spares_wait_for_a_store_without_programs_alone(store, farm, monkeypatch):
    monkeypatch.setenv(spare_workers.VARIABLE, "2")
    spare_workers.begin(store.folder)
    spares = list(spare_workers._spares)
    try:
        assert len(spares) == spare_workers.count() == 2
        farm.start(1, hello_of(store))  # takes one of them
        [worker] = farm._workers
        assert worker._process is spares[1]
        request = request_for(8)
        assert farm.make(lambda: request)
        assert store.has(request["key"])
    finally:
        spare_workers.end()
    assert spares[0].poll() is not None
    assert spare_workers._spares == []
    spare_workers.begin(store.folder)  # has a program now
    monkeypatch.setenv(spare_workers.VARIABLE, "0")
    spare_workers.begin(store.folder.parent / "empty")
    monkeypatch.delenv(spare_workers.VARIABLE)
    monkeypatch.setattr(spare_workers, "processors", lambda: 3)
    spare_workers.begin(store.folder.parent / "empty")
    assert spare_workers._spares == []


@pytest.mark.parametrize(
    ("has_driver", "cards", "hidden", "expected"),
    [
        (True, ("a card",), "", ["spares", "JAX", "device"]),
        (True, ("a card",), "JAX_PLATFORMS=cpu", ["JAX", "ended"]),
        (True, ("a card",), "jax.config.jax_platforms=cpu", ["spares", "JAX", "ended"]),
        (True, (), "", ["JAX", "ended"]),
        (False, (), "", []),
    ],
)
def test_spares_come_before_the_start_of_a_gpu(tmp_path, monkeypatch, has_driver, cards, hidden, expected):
    """While JAX is imported; they end where it turns out that cards are hidden."""
    done, begun = [], threading.Event()
    monkeypatch.setattr(loader, "start_driver", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu" if hidden.startswith("JAX_PLATFORMS") else "")
    monkeypatch.setattr(loader, "may_have_cards", lambda: has_driver)
    monkeypatch.setattr(loader, "nvidia_gpus", lambda: cards)

    def import_jax():
        if "spares" in expected:
            assert begun.wait(60)
        done.append("JAX")
        return hidden

    def begin(folder):
        done.append("spares")
        begun.set()

    monkeypatch.setattr(loader, "cards_are_hidden_by", import_jax)
    monkeypatch.setattr(loader, "programs_folder", lambda: tmp_path)
    monkeypatch.setattr(spare_workers, "begin", begin)
    monkeypatch.setattr(spare_workers, "end", lambda: done.append("ended"))
    monkeypatch.setattr(loader, "jax_sees_gpu", lambda: done.append("device"))
    loader.start_gpu()
    assert done == expected  # JAX is not imported where there is no driver


def test_nothing_is_started_where_it_is_of_no_use(store, farm, monkeypatch):
    started = []
    monkeypatch.setattr(Farm, "start", lambda self, count, hello: started.append(count))
    monkeypatch.setenv(spare_workers.VARIABLE, "3")
    programs.start_compilers(0)  # all are on disk
    store.is_read_only = True
    programs.start_compilers(5)
    programs.use_store(None)
    programs.start_compilers(5)
    programs.use_store(store)
    store.is_read_only = False
    monkeypatch.setenv(spare_workers.VARIABLE, "0")
    programs.start_compilers(5)
    monkeypatch.delenv(spare_workers.VARIABLE)
    monkeypatch.setattr(program_farm, "processors", lambda: 16)
    monkeypatch.setattr(program_farm, "free_on_card", lambda _: 80 << 30)
    programs.start_compilers(5)  # a CPU compiles side by side in threads, also beside a card
    assert started == []


def test_verify_names_the_programs_of_its_runs(f16_file, store, monkeypatch):
    """What is asked of other processes at the start is what the runs of the text and of stages then take."""
    asked, told = set(), set()
    key = lambda *arguments: forward_chunk.disk_key(*forward_chunk._split(arguments, {}))

    def stub(*arguments):
        asked.add(key(*arguments))
        chunk, layers = arguments[3].shape[1], SMALL.num_hidden_layers
        return {
            "logits": np.zeros((chunk, SMALL.vocab_size), np.float32),
            "expert_ids": np.zeros((chunk, layers, SMALL.num_experts_per_tok), np.int32),
            "cache": arguments[2],
            "stages": {},
        }

    def begin(self, more):
        told.update(wanted.program.disk_key(*wanted.program._split((), wanted.arguments)) for wanted in more)

    monkeypatch.setattr(forward, "forward_chunk", stub)
    monkeypatch.setattr(Preparation, "begin_elsewhere", begin)
    monkeypatch.setattr(Evidence, "is_batch_invariant", True)
    with open_model(f16_file) as source, own_settings():
        runner = JaxRunner(source, max_context=CONTEXT, kernels="xla")
        evidence = Evidence(Oracle(source, list(range(200))), runner)
        evidence.expect(list(RUNS))
        ids = np.arange(200, dtype=np.int32)
        chosen = np.arange(SMALL.num_experts_per_tok, dtype=np.int32)
        experts = np.tile(chosen, (SMALL.num_hidden_layers, 200, 1))
        few, cut = layers_option(runner, source), {"chunk_sizes": (STAGE_CHUNK,)}
        runner.forward(ids[:TOKENS], capture=FUSED_STAGES, **few)
        runner.forward(ids)
        runner.forward(ids, expert_ids=experts, capture=("ffn_moe_logits",))
        runner.forward(ids[:DECODED_TOKENS], expert_ids=experts[:, :DECODED_TOKENS], chunk_sizes=(1,))
        _ = evidence.fused, evidence.single
        runner.forward(ids[: 3 * STAGE_CHUNK], capture=FUSED_STAGES, **cut)
        for size in BATCHES:
            _ = evidence.in_batches[size]()
        runner.close()
    assert asked - told == set()
    assert len(told - asked) == 1, "a batch of one, which was not run here"


@dataclass(frozen=True)
class Card:
    platform: str = "gpu"
    device_kind: str = "a card"
    local_hardware_id: int = 0
    pool: int = 0

    def memory_stats(self):
        return {"pool_bytes": self.pool, "bytes_in_use": 0}


@pytest.mark.parametrize(
    ("missing", "processors", "host", "card", "needed", "expected"),
    [
        (3, 16, 100, 80, 20, 2),
        (40, 16, 100, 80, 20, 14),
        (40, 64, 100, 80, 20, 14),
        (40, 8, 100, 80, 20, 6),
        (40, 3, 100, 80, 20, 0),
        (40, 16, 8, 80, 20, 2),
        (40, 16, 100, 24, 21, 3),
        (40, 16, 100, 24, 25, 0),
        (40, 16, 100, None, 0, 0),
        (1, 16, 100, 80, 20, 0),
    ],
)
def test_workers_fit_the_machine(monkeypatch, missing, processors, host, card, needed, expected):
    gib = 1 << 30
    monkeypatch.delenv(spare_workers.VARIABLE, raising=False)
    monkeypatch.setattr(program_farm, "processors", lambda: processors)
    monkeypatch.setattr(program_farm, "available_main_memory", lambda: host * gib)
    monkeypatch.setattr(program_farm, "free_on_card", lambda _: card and card * gib)
    assert workers_for(Card(), missing, needed * gib) == expected
    if card:  # a server's pool was taken at the start: the model's place is in it
        left = max(0, card - needed)
        monkeypatch.setattr(program_farm, "free_on_card", lambda _: left * gib)
        assert workers_for(Card(pool=needed * gib), missing, needed * gib) == expected
    if expected == missing - 1:
        assert workers_for(Card(), missing, needed * gib, here=0) == missing
    monkeypatch.setenv(spare_workers.VARIABLE, "0")
    assert workers_for(Card(), missing, needed * gib) == 0


def test_a_file_that_another_thread_has_finished_meanwhile_stops_nobody(tmp_path, monkeypatch):
    """Of ten programs made side by side one was not kept: its writer met another's unfinished file."""
    store = ProgramStore(tmp_path / "programs")
    store.put("a", b"1")
    glob = Path.glob
    gone = store.folder / "of-another-thread.part"
    monkeypatch.setattr(Path, "glob", lambda self, what: [gone] if "part" in what else glob(self, what))
    assert store.put("b", b"2")
    assert store.trouble == []

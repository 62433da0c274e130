"""Programs made ahead: the list of a session is whole, and what is made in the background ends cleanly."""

import gc
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from qwen3_moe_jax import api, cli, loader
from qwen3_moe_jax.commands import warm
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend import preparation as preparation_module
from qwen3_moe_jax.jax_backend import programs
from qwen3_moe_jax.jax_backend.generate import PREFILL_CHUNKS
from qwen3_moe_jax.jax_backend.params import device_params
from qwen3_moe_jax.jax_backend.preparation import Preparation
from qwen3_moe_jax.jax_backend.program_farm import MAX_WORKERS
from qwen3_moe_jax.jax_backend.runner import JaxRunner
from qwen3_moe_jax.jax_backend.session_programs import Session
from qwen3_moe_jax.jax_backend.step_sizes import prompt_counts, row_counts
from qwen3_moe_jax.jax_backend.wanted import long_of, missing_of
from qwen3_moe_jax.machine.threads import SHORT_TURN
from qwen3_moe_jax.testing.random_models import SMALL

ROOT = Path(__file__).parents[2]
CONTEXT = 768


def test_warm_makes_all_that_a_session_then_asks_for(f16_file, store, capsys, monkeypatch):
    command = ["warm", "-m", str(f16_file), "--context", str(CONTEXT)]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert "9 of 9 programs made" in said.out
    assert said.err.splitlines()[2].startswith("3 of 9: ")
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "all 9 programs are there\n"

    programs.forget()
    found: list[programs.Made] = []
    stop = programs.listen(lambda _, what: found.append(what) if what else None)
    try:
        with open_model(f16_file) as source:
            runner = JaxRunner(source, max_context=CONTEXT)
            for tokens, sampling in (
                (5, Sampling()),
                (100, Sampling(temperature=0)),
                (700, Sampling(top_k=0)),
            ):
                prompt = np.arange(tokens) % SMALL.vocab_size
                list(runner.stream(prompt, max_tokens=40, sampling=sampling, stop_ids={1}))
            runner.close()
    finally:
        stop()
    assert {what.source for what in found} == {"disk"}
    assert len(found) == 7, "all but the check and the clearing of a slot"


def test_shapes_without_weights_are_those_of_the_weights(source, jax_runner):
    shapes = device_params(source.config, source.types, jax_runner.device)
    kind = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert kind(shapes) == kind(jax_runner.params)
    assert jax.tree.structure(shapes) == jax.tree.structure(jax_runner.params)


def test_a_batch_of_sixteen_needs_no_more_than_the_docs_say(source, jax_runner):
    session = jax_runner._session
    assert len(session.programs()) == 8
    many = Session(session.decoder, session.params, CONTEXT, "float32", slots=16).programs()
    page = (ROOT / "docs" / "design" / "start-up.md").read_text()
    assert f"{len(many)} on a CPU" in page
    prompts = sum(len(prompt_counts(16, chunk)) for chunk in PREFILL_CHUNKS)
    others = len(session.programs()) - len(PREFILL_CHUNKS) - 1
    assert f"{others + len(row_counts(16)) + prompts} on a GPU with the decode kernel" in page
    assert f"at most {MAX_WORKERS}; none on a CPU" in page
    assert f"{MAX_WORKERS} at most" in (ROOT / "docs" / "reference" / "environment.md").read_text()
    assert len({w.label for w in many}) == len(many)


class Fake:
    """A program that takes no time; ``stored`` ones are on disk."""

    def __init__(self, log, name, stored=False, held=None):
        self.log, self.name, self.stored, self.held = log, name, stored, held
        self.is_ready, self.program = False, SimpleNamespace(is_long=True)

    @property
    def is_stored(self):
        return self.stored

    def lower(self):
        self.log.append(f"{self.name} lowered")

    def load(self):
        self.is_ready = self.is_ready or self.stored
        return self.is_ready

    def make(self):
        self.log.append(self.name)
        if self.held is not None:
            self.held.wait()
        self.is_ready = True


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(preparation_module, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(programs, "keeps_on_disk", lambda: True)


def test_long_programs_that_are_nowhere_are_counted():
    made, stored, short, long = Fake([], "a"), Fake([], "b", stored=True), Fake([], "c"), Fake([], "d")
    made.is_ready, short.program.is_long = True, False
    missing = missing_of([made, stored, short, long])
    assert missing == [short, long]
    assert long_of(missing) == [long]


def test_what_is_on_disk_comes_before_what_is_compiled(kept):
    log = []
    wanted = [Fake(log, "a"), Fake(log, "b", stored=True), Fake(log, "c")]
    preparation = Preparation(wanted)
    preparation.go_on()
    preparation._worker.join()
    assert log == ["a", "c"]
    assert preparation.made == 3


def test_the_next_is_lowered_while_one_is_compiled():
    """Each compilation waits here until the last program has been lowered."""
    log, held = [], threading.Event()
    wanted = [Fake(log, "a", held=held), Fake(log, "b", held=held), Fake(log, "c", stored=True)]
    wanted += [Fake(log, "d", held=held)]
    wanted[-1].lower = held.set
    preparation = Preparation(wanted)
    preparation.begin(wanted, compiles=True)
    assert held.wait(60)
    preparation._lowering.shutdown()
    preparation._first.shutdown()
    assert preparation.made == 4
    assert [entry for entry in log if "lowered" in entry] == ["a lowered", "b lowered"]


def test_all_are_made_when_make_all_returns():
    log = []
    wanted = [Fake(log, "a"), Fake(log, "b", stored=True), Fake(log, "c")]
    wanted[0].make = lambda: 1 / 0  # it fails again where it is called
    preparation = Preparation(wanted, only_when_idle=True)
    preparation.make_all()
    assert [w.is_ready for w in wanted] == [False, True, True]
    preparation.close()
    preparation.make_all()  # nothing is begun, nothing is waited for


def test_what_is_on_disk_is_loaded_and_nothing_is_compiled():
    log = []
    wanted = [Fake(log, "a"), Fake(log, "b", stored=True), Fake(log, "c", stored=True)]
    Preparation(wanted).load_stored()
    assert (log, [w.is_ready for w in wanted]) == ([], [False, True, True])


def test_a_batch_that_has_loaded_its_programs_waits_for_none(f16_file, store):
    def steps(runner, *, loads: bool) -> list[str]:
        batch, found = runner.open_batch(4, context=64), []
        if loads:
            batch.load_programs()
        stop = programs.listen(lambda name, made: found.append(name) if made else None)
        for token in (1, 2, 3):
            batch.admit([token] * 5, max_tokens=3)
        while batch.running:
            batch.step(2)
        stop()
        batch.close()
        return found

    with open_model(f16_file) as source:
        runner = JaxRunner(source, max_context=64)
        runner.preparation.close()
        assert steps(runner, loads=False)
        programs.forget()
        assert steps(runner, loads=True) == []
        runner.close()


def test_without_a_known_prompt_nothing_is_lowered_that_is_not_on_disk():
    log = []
    preparation = Preparation([])
    preparation.begin([Fake(log, "a"), stored := Fake(log, "b", stored=True)], compiles=False)
    preparation._lowering.shutdown()
    preparation._first.shutdown()
    assert (log, stored.is_ready) == ([], True)


def test_a_program_that_is_compiled_holds_up_no_lowering(store):
    """Whoever compiles holds a lock of its own: the thread that lowers goes on to the next program."""
    program = programs.Program(lambda x: x * 2)
    x = jax.ShapeDtypeStruct((3,), np.float32)
    program.lower(x)
    (entry,) = program._programs.values()
    assert entry.lowered is not None
    with entry.compiling:
        done = threading.Thread(target=program.lower, args=(x,))
        done.start()
        done.join(60)
        assert not done.is_alive()
    program.prepare(x)
    assert (entry.program is not None, entry.lowered, entry.traced) == (True, None, None)


def test_no_cycles_are_looked_for_while_a_program_is_traced(store):
    seen = []
    program = programs.Program(lambda x: seen.append(gc.isenabled()) or x)
    assert gc.isenabled()
    program.lower(jax.ShapeDtypeStruct((3,), np.float32))
    assert (seen, gc.isenabled()) == ([False], True)
    gc.disable()  # as a user has it
    program.lower(jax.ShapeDtypeStruct((4,), np.float32))
    assert not gc.isenabled()
    gc.enable()


def test_what_the_first_tokens_need_is_all_that_they_call(source, jax_runner):
    """Two small programs were compiled after the load, while the first token was waited for."""
    session = jax_runner._session
    first = {w.label for w in session.first(100)}
    assert first == {w.label for w in session.programs()} - {
        "prompts of 16 tokens",
        "prompts of 512 tokens",
        "clearing a slot",
    }


def test_nothing_is_compiled_ahead_that_no_later_process_finds(monkeypatch):
    monkeypatch.setattr(programs, "keeps_on_disk", lambda: False)
    preparation = Preparation([Fake([], "a")])
    preparation.go_on()
    assert preparation._worker is None


def test_close_lets_the_one_under_way_end_and_begins_no_other(kept):
    log, held = [], threading.Event()
    preparation = Preparation([Fake(log, "a", held=held), Fake(log, "b")])
    preparation.go_on()
    while not log:
        pass
    assert preparation.is_compiling
    assert preparation_module.is_compiling()
    preparation.close()
    held.set()
    preparation._worker.join()
    assert log == ["a"]
    assert not preparation_module.is_compiling()


@pytest.mark.parametrize("are_kept", [True, False])
def test_one_that_a_later_process_will_find_is_waited_for(kept, are_kept):
    log, held = [], threading.Event()
    preparation = Preparation([], are_kept=are_kept)
    compiling = threading.Thread(target=preparation._make, args=(Fake(log, "a", held=held), True))
    compiling.start()
    while not log:
        pass
    preparation_module.finish(0.0)
    assert preparation.is_compiling
    if are_kept:
        threading.Timer(0.1, held.set).start()
    preparation_module.finish(60.0)
    assert preparation.is_compiling is not are_kept
    held.set()
    compiling.join()


def test_one_that_is_loaded_or_made_does_not_end_what_another_thread_compiles(kept):
    log, held = [], threading.Event()
    preparation = Preparation([])
    compiling = threading.Thread(target=preparation._make, args=(Fake(log, "a", held=held), True))
    compiling.start()
    while not log:
        pass
    preparation._make(Fake(log, "b"), True)
    assert log == ["a", "b"]
    assert preparation.is_compiling
    held.set()
    compiling.join()
    assert not preparation.is_compiling


def test_first_tokens_of_two_streams_at_once_start_one_thread(kept, monkeypatch):
    started, real = [], threading.Thread

    class Slow(real):
        """While the first is being made another stream has its first token."""

        def __init__(self, **options):
            super().__init__(**options)
            started.append(self)
            if len(started) == 1:
                other.start()
                other.join(0.2)

    preparation = Preparation([Fake([], "a")])
    other = real(target=preparation.go_on)
    monkeypatch.setattr(preparation_module.threading, "Thread", Slow)
    preparation.go_on()
    other.join()
    for thread in started:
        thread.join()
    assert len(started) == 1


def test_costs_that_two_threads_begin_at_once_both_count():
    estimate = warm.Estimate(10.0)
    other = threading.Thread(target=estimate.begins, args=(1.0,))

    class Cost(float):
        """Another thread begins one while this one is added."""

        def __radd__(self, sum):
            other.start()
            other.join(0.2)
            return sum + float(self)

    estimate.begins(Cost(2.0))
    other.join()
    estimate.done(1.0)
    assert estimate.in_words() == ""  # 1 done, 2 under way
    estimate.done(2.0)
    assert estimate._under_way == 0.0


def test_threads_take_short_turns_while_one_is_compiled_in_the_background(kept):
    """With the interpreter's own 5 ms, a token that is written meanwhile waits a hundred times as long."""
    found, before = [], sys.getswitchinterval()
    wanted = Fake([], "a")
    wanted.make = lambda: found.append(sys.getswitchinterval())
    preparation = Preparation([wanted])
    preparation.go_on()
    preparation._worker.join()
    assert found[0] == pytest.approx(SHORT_TURN)
    assert sys.getswitchinterval() == before


def test_programs_are_compiled_while_the_model_is_idle(kept):
    log = []
    preparation = Preparation([Fake(log, "a")])
    with preparation.working():
        preparation.go_on()
        preparation._worker.join(timeout=0.05)
        assert log == []
    preparation._worker.join()
    assert log == ["a"]


def test_a_failure_is_left_to_the_call_that_needs_the_program(kept):
    wanted = Fake([], "a")
    wanted.make = lambda: 1 / 0
    preparation = Preparation([wanted])
    preparation.go_on()
    preparation._worker.join()
    assert not preparation.is_compiling
    assert preparation.made == 0


def test_a_process_that_ends_does_not_begin_another(tmp_path):
    """Nobody has closed anything: the thread itself sees that the main thread is gone."""
    code = """
import threading
from tests.model.test_preparation import Fake, Preparation, programs
programs.keeps_on_disk = lambda: True
main, began = threading.main_thread(), threading.Event()
class Last(Fake):
    def make(self):
        began.set()
        main.join()
        print("made", self.name, flush=True)
preparation = Preparation([Last([], "a"), Last([], "b")], only_when_idle=False)
preparation.go_on()
began.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("made a\n", "", 0)


def test_an_estimate_is_given_when_it_is_known(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(warm.time, "monotonic", lambda: now[0])
    estimate = warm.Estimate(4.0)
    assert estimate.in_words() == ""
    estimate.begins(0.5)
    estimate.done(0.5)
    now[0] = 10.0
    assert estimate.in_words() == ""
    estimate.begins(0.5)
    estimate.done(0.5)
    assert estimate.in_words() == "; about 30 s left"


def test_an_estimate_takes_what_is_made_side_by_side_for_half_done(monkeypatch):
    """Twelve programs of 10 s, four at a time: nothing is said before a round is over, then the truth."""
    now = [0.0]
    monkeypatch.setattr(warm.time, "monotonic", lambda: now[0])
    estimate = warm.Estimate(12.0)
    for _ in range(4):
        assert estimate.in_words() == ""
        estimate.begins(1.0)
    now[0] = 10.0
    estimate.done(1.0)
    assert estimate.in_words() == ""  # and not 110 s
    for _ in range(3):
        estimate.done(1.0)
    assert estimate.in_words() == "; about 20 s left"
    for _ in range(4):
        estimate.begins(1.0)
    now[0] = 15.0
    assert estimate.in_words() == "; about 15 s left"


def test_a_gpu_starts_beside_the_opening_of_a_file(monkeypatch, tmp_path):
    """Not for a mesh, which may have to ask for more devices before JAX starts."""
    threads: list[str] = []
    monkeypatch.setattr(loader, "start_gpu", lambda: threads.append(threading.current_thread().name))
    for options in ({}, {"mesh": "tp=1"}, {"backend": "reference"}):
        with pytest.raises(ModelFileError):
            api.load(tmp_path / "absent.gguf", **options)
    assert threads == ["ahead_0"]


def test_what_is_on_disk_is_loaded_after_what_the_load_itself_needs(source, monkeypatch):
    """A GPU takes in one program at a time: those that unpack weights came after those that write tokens."""
    order: list[str] = []
    monkeypatch.setattr(
        Preparation, "begin", lambda self, first, *, compiles, **_: order.append(f"{compiles}")
    )
    runner = JaxRunner(source, max_context=64, progress=lambda done, total: order.append("weights"))
    runner.close()
    assert order[:3] == ["True", "False", "weights"]
    assert set(order[3:]) == {"weights"}

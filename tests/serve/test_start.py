"""How a server starts and why it does not: ports, limits, help, an engine that dies again and again."""

import asyncio
import contextlib
import io
import socket
from types import SimpleNamespace

import pytest

from qwen3_moe_jax import cli
from qwen3_moe_jax.jax_backend.step_sizes import row_counts
from qwen3_moe_jax.serve import run as serve_run
from qwen3_moe_jax.serve.engine import worker
from qwen3_moe_jax.serve.engine.client import MAX_RESTARTS, EngineClient
from qwen3_moe_jax.serve.engine.frames import Start, send
from qwen3_moe_jax.serve.engine.pooled import PooledBatch
from qwen3_moe_jax.serve.run import ServeError
from qwen3_moe_jax.serve.settings import Settings
from qwen3_moe_jax.testing.fake_batch import FakeBatch

pytest.importorskip("uvicorn")


def command(*arguments):
    """Exit code and standard error of a command."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = cli.main(list(arguments))
    return code, errors.getvalue()


def test_a_port_that_is_taken_is_one_line(model_files):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, errors = command("serve", str(model_files["hermes"]), "--port", str(port))
    assert code == 1
    (line,) = errors.strip().splitlines()
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in line


def test_a_port_that_needs_rights_is_one_line(monkeypatch):
    class Refusing(socket.socket):
        def bind(self, address):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(serve_run.socket, "socket", Refusing)
    with pytest.raises(ServeError, match="cannot listen on 127.0.0.1 port 80: Permission denied"):
        serve_run._listen("127.0.0.1", 80)


def test_an_engine_that_dies_is_started_again_three_times(monkeypatch):
    """And not a fourth time within ten minutes; deaths that are older do not count."""
    clock, lives = [0.0], []
    monkeypatch.setattr("qwen3_moe_jax.serve.engine.client.time.monotonic", lambda: clock[0])

    async def dies(self):
        lives.append(clock[0])
        clock[0] += pause

    monkeypatch.setattr(EngineClient, "_live", dies)
    pause = 1.0
    client = EngineClient(Start(None))
    asyncio.run(client._keep())
    assert len(lives) == 1 + MAX_RESTARTS
    assert client.restarts == MAX_RESTARTS
    assert client.health == "dead"
    assert "died 4 times in 600 s" in client.fault

    pause, lives[:] = 250.0, []

    async def dies_but_later_it_is_told_to_end(self):
        await dies(self)
        self.is_draining = len(lives) == 10

    monkeypatch.setattr(EngineClient, "_live", dies_but_later_it_is_told_to_end)
    client = EngineClient(Start(None))
    asyncio.run(client._keep())
    assert (len(lives), client.fault) == (10, "")


def test_an_engine_whose_process_cannot_be_started_is_a_fault_and_no_wait_for_ever(monkeypatch):
    """A system that has no more processes: the server ends with a line, or says that it is dead."""

    def refused(*_arguments, **_options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("qwen3_moe_jax.serve.engine.client.subprocess.Popen", refused)
    client = EngineClient(Start(None))
    asyncio.run(client._keep())
    assert client.first_ready.is_set()
    assert client.health == "dead"
    assert client.fault == "the engine's process cannot be started: Resource temporarily unavailable"


def test_every_limit_is_said():
    said = Settings(api_keys=("sk-secret",)).describe()
    for name in ("max_body", "header_seconds", "max_queue", "queue_seconds", "drain_seconds", "max_grammars"):
        assert f"{name} = " in said
    assert "sk-secret" not in said


def test_help_has_a_line_for_each_client(capsys):
    assert cli.main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    for client in ("OpenAI's Python", "Anthropic's Python", "Claude Code", "Codex", "Qwen Code", "curl"):
        assert client in said


@pytest.mark.parametrize(("kind", "made"), [("gpu", ["short", "long"]), ("cpu", [])])
def test_a_gpu_has_all_programs_before_it_is_ready(kind, made):
    """A running answer would wait for the compiler; a CPU compiles while it is idle."""
    log, batches = [], {"short": FakeBatch(capacity=64), "long": FakeBatch(capacity=256)}
    for name, batch in batches.items():
        batch.make_programs = lambda name=name: log.append(name)
    engine = object.__new__(worker.Engine)
    engine.model = SimpleNamespace(runner=SimpleNamespace(platform=kind))
    engine.scheduler = SimpleNamespace(batch=PooledBatch(list(batches.values())))
    engine.rows = ()
    engine._warm_up()
    assert log == made


@pytest.mark.parametrize("slots", [1, 4, 16, 20])
def test_a_warm_server_has_written_for_every_number_of_rows(slots):
    """A step's program is that of its last row; one that is missing would be compiled beside answers."""
    numbers, reads = set(), set()

    class Spy(FakeBatch):
        def step(self, tokens=1, *, prompt_tokens=16, ahead=0):
            if not self.waiting:
                running = [slot for slot, s in self.sequences.items() if s.finish_reason is None]
                numbers.add(next(n for n in row_counts(slots) if n > max(running)))
            found = super().step(tokens, prompt_tokens=prompt_tokens, ahead=ahead)
            reads.add(self.read_tokens)
            return found

    batch = Spy(slots=slots, capacity=1024, chunk=512)
    worker._warm_up_rows(batch, range(slots), 1000)
    assert numbers == set(row_counts(slots))
    assert reads >= {7, 99, 499}
    assert not batch.sequences


def test_what_a_compiler_took_is_given_back_once(monkeypatch):
    log = []
    monkeypatch.setattr(worker.resident, "give_back", lambda: log.append("given back"))
    engine = object.__new__(worker.Engine)
    engine.programs, engine._has_compiled = 0, False
    engine._count_program("decode", None)  # it begins
    engine.tidy()
    assert log == []
    engine._count_program("decode", object())
    engine.tidy()
    engine.tidy()
    assert (engine.programs, log) == (1, ["given back"])


def test_an_engine_takes_the_card_before_it_loads(monkeypatch):
    """JAX reads the policy when it starts, once."""
    log: list[str] = []

    class Failing:
        def __init__(self, start):
            log.append("load")
            raise MemoryError

    monkeypatch.setattr(worker.jax_devices, "take_card", lambda: log.append("take"))
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "_read_forever", lambda *_: None)  # which ends the process
    monkeypatch.setattr(worker, "Engine", Failing)
    ours, theirs = socket.socketpair()
    with ours:
        send(ours, Start(model=None))
        with pytest.raises(SystemExit):
            worker.main(theirs.detach())
        assert b"MemoryError" in ours.recv(4096)
    assert log == ["take", "load"]

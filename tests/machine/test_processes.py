"""Processes find each other, agree, and see each other die; what keeps them apart is said in one line."""

import queue
import socket
import threading
from contextlib import closing, suppress

import pytest

from qwen3_moe_jax.core.errors import BackendUnavailableError, OptionError
from qwen3_moe_jax.machine import peers, processes
from qwen3_moe_jax.machine.peers import Peers, PeersEndedError, check_same
from qwen3_moe_jax.machine.processes import Processes

pytestmark = pytest.mark.timeout(60)


def free_address() -> str:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def all_at_once(*calls):
    """The results of calls that wait for one another, or their errors."""
    found = [None] * len(calls)

    def run(number, call):
        try:
            found[number] = call()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def meeting(*indices, count=None, address=None, seconds=30.0):
    """What ``meet`` gives to processes with these numbers, or its errors."""
    address, count = address or free_address(), count or len(indices)
    call = lambda index: lambda: processes.meet(Processes(address, count, index, seconds))
    return all_at_once(*map(call, indices))


def close(group):
    """Ends all of one process."""
    for its in group:
        its.on_loss = lambda *what: None
    for its in group:
        its.close()


@pytest.fixture
def three():
    found = [its for its, _ in meeting(0, 1, 2)]
    yield found
    close(found)


# What they say to each other


def test_all_get_the_values_of_all(three):
    given = [{"x": 1}, [2.5], None]
    calls = [lambda p=p, v=v: p.everyones("a value", v) for p, v in zip(three, given, strict=True)]
    assert all_at_once(*calls) == [given] * 3
    whole = [b"", b"\0" * 5, bytes(range(256)) * 9000]
    calls = [lambda p=p, v=v: p.everyones_bytes("bytes", v) for p, v in zip(three, whole, strict=True)]
    assert all_at_once(*calls) == [whole] * 3


def test_process_0_waits_for_nobody(three):
    first, *others = three
    for number in range(3):
        assert first.from_first("n", b"%d" % number) == b"%d" % number
    for other in others:
        assert [other.from_first("n") for _ in range(3)] == [b"0", b"1", b"2"]


def test_another_exchange_is_a_fault(three):
    first, other, _ = three
    first.from_first("a step", b"")
    with pytest.raises(RuntimeError, match="process 0 is at a step, process 1 at a file"):
        other.from_first("a file")


def test_a_fact_that_differs_is_named_everywhere_in_the_same_words(three):
    facts = [{"mesh": "ep=3", "file": name} for name in ("a", "a", "b")]
    calls = [lambda p=p, f=f: check_same(p, f, what="facts") for p, f in zip(three, facts, strict=True)]
    lines = {str(error) for error in all_at_once(*calls)}
    assert lines == {"process 2 has another file than process 0 (b, a): every process needs the same"}


# How one sees that another has gone


def losses(three) -> list[queue.SimpleQueue]:
    found = [queue.SimpleQueue() for _ in three]
    for its, lost in zip(three, found, strict=True):
        its.on_loss = lambda *what, lost=lost: lost.put(what)
    return found


def test_a_process_that_goes_without_a_word_ends_the_others(three):
    lost = losses(three)
    three[2]._connections[0].shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that is killed
    line = "process 2 of 3 has ended without a word: this process ends too"
    assert [lost[i].get(timeout=30) for i in (0, 1)] == [(line, 1)] * 2


def test_a_process_that_fails_says_why(three, monkeypatch):
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.05)
    lost = losses(three)
    three[1].leave(3, "the memory does not suffice")
    line = "process 1 of 3 ended with exit code 3: the memory does not suffice"
    assert [lost[i].get(timeout=30) for i in (0, 2)] == [(line, 3)] * 2


def test_a_process_that_ends_rightly_ends_nobody(three):
    lost = losses(three)
    three[0].leave()
    three[1].leave()
    three[1].close()
    three[0].wait_for_others(0)
    with pytest.raises(PeersEndedError, match="process 0 has ended, and process 2 waits for its next step"):
        three[2].from_first("next step")
    assert all(of.empty() for of in lost)


def test_a_process_that_is_silent_has_gone(monkeypatch):
    monkeypatch.setattr(peers, "SILENT_SECONDS", 0.2)
    one, other = socket.socketpair(socket.AF_UNIX)
    monkeypatch.setattr(peers, "_set_no_delay", lambda connection: None)
    with other:
        its, lost = Peers(0, 2, {1: one}), queue.SimpleQueue()
        its.on_loss = lambda *what: lost.put(what)
        assert lost.get(timeout=30) == ("process 1 of 2 was silent for 0 s: this process ends too", 1)
        its.close()


# What keeps them apart


def test_nobody_is_there():
    (error,) = meeting(1, count=2, seconds=0.3)
    assert isinstance(error, BackendUnavailableError)
    assert "process 0 is not reached at 127.0.0.1:" in str(error)
    assert "within 0.3 s (Connection refused): is it started" in str(error)


def test_process_0_names_those_that_do_not_come():
    first, one = meeting(0, 2, count=4, seconds=1.0)
    assert isinstance(first, BackendUnavailableError)
    assert str(first).endswith("within 1 s: 1, 3")
    assert str(one) == str(first)


def test_a_stranger_is_sent_away():
    address = free_address()
    host, port = address.split(":")
    join = lambda index: processes.meet(Processes(address, 2, index, 30.0))

    def stranger() -> None:
        connect = lambda: socket.create_connection((host, int(port)))
        with suppress(ConnectionResetError):
            while True:
                with suppress(ConnectionRefusedError), connect() as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100)
                    connection.recv(100)
                    return

    def second():
        stranger()
        return join(1)

    close([its for its, _ in all_at_once(lambda: join(0), second)])


def test_two_processes_with_one_number():
    found = meeting(0, 1, 1, count=3)
    assert {str(error) for error in found} == {"two processes have the process id 1: give each its own"}


def test_other_versions_are_named(monkeypatch):
    address, mine = free_address(), processes.versions()
    its = {**mine, "jaxlib": "0.1"}
    first, second = threading.Event(), iter([mine, its])
    monkeypatch.setattr(processes, "versions", lambda: next(second))

    def zero():
        call = processes.meet
        found = Processes(address, 2, 0, 30.0)
        first.set()
        return call(found)

    def one():
        first.wait()
        return processes.meet(Processes(address, 2, 1, 30.0))

    lines = {str(error) for error in all_at_once(zero, one)}
    assert len(lines) == 1
    (line,) = lines
    assert "another jaxlib than process 0 (" in line


def test_another_count_is_named():
    address = free_address()
    calls = [lambda i=i, n=n: processes.meet(Processes(address, n, i, 30.0)) for i, n in ((0, 2), (1, 3))]
    lines = {str(error) for error in all_at_once(*calls)}
    assert lines == {
        "process 1 has another number of processes than process 0 (3, 2): every process needs the same"
    }


def test_a_port_that_is_taken():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(OptionError, match=r"process 0 cannot listen on [\d.:]+ \(Address already"):
            processes.meet(Processes(address, 2, 0, 1.0))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Processes("10.0.0.1", 2, 0), "is not such as 10.0.0.1:7000"),
        (Processes("host:0", 2, 0), "is not such as"),
        (Processes("a:b:1", 2, 0), "is not such as"),
        (Processes("host:1", 2, 2), "process id 2 is not one of 2 processes: give 0 to 1"),
        (Processes("host:1", 2), "belong together"),
        (Processes(count=2, index=0), "belong together"),
    ],
)
def test_what_cannot_be_is_refused(given, words):
    with pytest.raises(OptionError, match=words):
        processes.join(given)


def test_an_address_of_ipv6():
    assert processes.split_address("[::1]:7000") == ("::1", 7000)


def test_no_cluster_is_found(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OptionError, match="JAX finds no Slurm and no Open MPI here"):
        processes.join(Processes())


def test_slurm_is_found(monkeypatch):
    variables = {
        "SLURM_JOB_ID": "77",
        "SLURM_PROCID": "1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "alpha,beta",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = Processes().found()
    assert (found.count, found.index) == (2, 1)
    assert (found.coordinator or "").startswith("alpha:")
    assert not Processes().is_first


def test_a_started_jax_joins_nobody():
    import jax

    jax.devices()
    with pytest.raises(BackendUnavailableError, match="JAX has started in this process"):
        processes.join(Processes("127.0.0.1:7", 2, 1))


def test_one_process_is_alone():
    processes.join(Processes("127.0.0.1:7", 1, 0))
    assert processes.joined() is None
    assert processes.count() == 1
    assert processes.is_first()
    assert processes.everyones("x", 5) == [5]
    assert processes.of_first("x", 5) == 5
    processes.check_all_have({"x": 5}, what="x")

"""The processes of one model, on one host or on several: how they find each other, and what they agree on.

Every process runs the same program. Process 0 listens at an address that all are told; they compare their
versions there before JAX is started, and then join ``jax.distributed``, whose own service process 0 opens at
a free port of the same address. ``peers`` is how they talk from then on, and how they see each other die.
"""

import atexit
import importlib.metadata
import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from qwen3_moe_jax.core.code_version import code_version
from qwen3_moe_jax.core.errors import BackendUnavailableError, OptionError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.machine import peers
from qwen3_moe_jax.machine.jax_devices import import_jax
from qwen3_moe_jax.machine.peers import Peers, check_same, difference, read_frame, send_frame

JOIN_SECONDS = 120.0
"""So long processes wait for each other at the start."""

HELLO_SECONDS = 5.0
"""What connects and says nothing for so long is none of the processes."""

RETRY_SECONDS = 0.2

HEARTBEAT_SECONDS = 100
"""JAX's own watch; that of ``peers`` is sooner."""

SHUTDOWN_SECONDS = 15

MAX_PROCESSES = 4096

CLUSTER_INDICES = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Variables by which a cluster says a process' number."""


@dataclass(frozen=True)
class Processes:
    """Which of how many this process is; with nothing but defaults JAX finds out (Slurm, Open MPI).

    Attributes:
      coordinator: "HOST:PORT" at which process 0 listens: an address of its host that the others reach.
      count: how many processes there are.
      index: the number of this one, from 0 on.
      seconds: how long they wait for each other at the start.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    seconds: float = JOIN_SECONDS

    @property
    def is_named(self) -> bool:
        """Whether JAX has nothing to find out."""
        return None not in (self.coordinator, self.count, self.index)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        return split_address(self.coordinator or "")

    def check(self) -> None:
        """Raises OptionError for numbers or an address that cannot be."""
        if self.is_named:
            split_address(self.coordinator or "")
            check_number(self.count or 0, self.index or 0)
        elif (self.coordinator, self.count, self.index) != (None, None, None):
            raise OptionError(
                "--coordinator HOST:PORT, --num-processes N and --process-id I belong together: give all"
            )

    def found(self) -> "Processes":
        """The same with what JAX finds out of the cluster.

        Raises:
          OptionError: this is no cluster that JAX knows.
        """
        if self.is_named:
            return self
        import_jax()
        from jax._src.clusters import ClusterEnv  # the only place where JAX says what it would take

        detect = ClusterEnv.auto_detect_unset_distributed_params
        address, count, index, _ = detect(None, None, None, None, None, int(self.seconds))
        if address is None or count is None or index is None:
            raise OptionError(
                "JAX finds no Slurm and no Open MPI here: give --coordinator HOST:PORT, --num-processes N "
                "and --process-id I"
            )
        return Processes(address, count, index, self.seconds)

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, as far as that is known before JAX is asked.

        Raises:
          OptionError: it is not known.
        """
        numbers = (os.environ.get(name, "") for name in CLUSTER_INDICES)
        known = [self.index] if self.is_named else [int(n) for n in numbers if n.isdigit()]
        if not known:
            return self.found().index == 0
        return known[0] == 0


def split_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT"; an IPv6 address stands in brackets.

    Raises:
      OptionError: it is none.
    """
    found = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:\[\]]+):(\d{1,5})", text)
    if found is None or not 0 < int(found[2]) < 65536:
        raise OptionError(f"coordinator {text!r} is not such as 10.0.0.1:7000")
    return found[1].strip("[]"), int(found[2])


def check_number(count: int, index: int) -> None:
    """Raises OptionError for a process that is none of so many."""
    if not 1 <= count <= MAX_PROCESSES:
        raise OptionError(f"{count} processes: give --num-processes a number from 1 to {MAX_PROCESSES}")
    if not 0 <= index < count:
        raise OptionError(f"process id {index} is not one of {count} processes: give 0 to {count - 1}")


_joined: Peers | None = None
_reactions: dict[str, Any] = {}


def joined() -> Peers | None:
    """The other processes; None where there are none."""
    return _joined


def count() -> int:
    """How many processes there are."""
    return _joined.count if _joined else 1


def is_first() -> bool:
    """Whether this is the process that speaks to people: process 0, or the only one."""
    return _joined is None or _joined.index == 0


def join(processes: Processes) -> None:
    """Joins the others, and ``jax.distributed``; before JAX is asked for a device.

    A second call with the same processes does nothing.

    Raises:
      OptionError: what cannot be; a process that has other versions, or a number that is taken.
      BackendUnavailableError: the others do not come, or JAX has started already.
    """
    global _joined
    processes.check()
    found = processes.found()
    check_number(found.count or 0, found.index or 0)
    if _joined is not None:
        if (_joined.index, _joined.count) != (found.index, found.count):
            raise OptionError(f"this process is number {_joined.index} of {_joined.count} already")
        return
    if found.count == 1:
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        raise BackendUnavailableError(
            "JAX has started in this process, and knows its own devices alone: join the others before"
        )
    _joined, address = meet(found)
    for name, act in _reactions.items():
        setattr(_joined, name, act)
    try:
        _initialize(found, address)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        line = f"process {found.index} does not join jax.distributed at {address}: {said}"
        leave(ExitCode.FAULT, line)
        raise BackendUnavailableError(line) from error
    atexit.register(_leave_at_exit)


def _initialize(found: Processes, address: str) -> None:
    jax = import_jax()
    with suppress(AttributeError):  # it waits for a lent machine's end, and writes when a process dies
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=found.count,
        process_id=found.index,
        cluster_detection_method=None if _is_on_cluster() else "deactivate",
        initialization_timeout=max(int(found.seconds), 1),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def _is_on_cluster() -> bool:
    """Whether JAX shares out a host's GPUs between its processes."""
    return any(name in os.environ for name in CLUSTER_INDICES)


def leave(code: int, line: str = "") -> None:
    """Says to the others that this process ends; ``code`` other than 0 ends them too."""
    if _joined is not None:
        _joined.leave(code, line)


def end(code: int) -> None:
    """Ends this process after a command; returns where JAX may end its own way.

    After a fault it may not: it would wait for the others, which are in a collective operation.
    """
    leave(code)
    if _joined is not None and code and _joined.index == 0:
        # JAX's service is here, and they would tell of its end
        _joined.wait_for_others(peers.GRACE_SECONDS + 1)
    if _joined is not None and code:
        os._exit(code)


def say_goodbye() -> None:
    """Of process 0, which ends rightly: waits a little for the others, which end too."""
    leave(ExitCode.DONE)
    if _joined is not None:
        _joined.wait_for_others(peers.GRACE_SECONDS)


def react(
    *, on_loss: Callable[[str, int], object] = peers.end_process, on_end: Callable[[], object] | None = None
) -> None:
    """Sets what is done when another process has gone, or ended, as ``Peers`` has it; before ``join``."""
    _reactions.update(on_loss=on_loss, on_end=on_end)


def _leave_at_exit() -> None:
    is_fault = getattr(sys, "last_value", None) is not None
    leave(ExitCode.FAULT if is_fault else ExitCode.DONE)


def await_news(error: BaseException) -> None:
    """Before a fault of JAX is told: it may be that another process has gone, which is told in its place."""
    if _joined is not None and type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        time.sleep(peers.GRACE_SECONDS)


def everyones(name: str, value: Any) -> list[Any]:
    """A value of each process, in their order; see ``Peers.everyones``."""
    return [value] if _joined is None else _joined.everyones(name, value)


def everyones_bytes(name: str, value: bytes) -> list[bytes]:
    """The same of bytes."""
    return [value] if _joined is None else _joined.everyones_bytes(name, value)


def of_first(name: str, value: Any) -> Any:
    """What process 0 has, plain data as JSON has it; the others' values do not matter."""
    return value if _joined is None else json.loads(_joined.from_first(name, json.dumps(value).encode()))


def check_all_have(facts: Mapping[str, object], *, what: str) -> None:
    """Raises OptionError where a process has other facts than process 0; see ``peers.check_same``."""
    if _joined is not None:
        check_same(_joined, facts, what=what)


# How they meet


def versions() -> dict[str, str]:
    """What has to be the same in all processes."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"version of this package's code": code_version(), **packages, "Python": python}


def meet(found: Processes) -> tuple[Peers, str]:
    """Connects all processes; gives the address of JAX's service, too.

    Raises:
      OptionError, BackendUnavailableError: as ``join``.
    """
    assert found.count is not None, "it was found"
    facts = {"number of processes": str(found.count), **versions()}
    if found.index:
        connection, address = _call(found, facts)
        return Peers(found.index, found.count, {0: connection}), address
    return _receive_all(found, facts)


def _receive_all(found: Processes, facts: Mapping[str, str]) -> tuple[Peers, str]:
    """Process 0's side."""
    assert found.count is not None, "found"
    host, port = found.address
    until = time.monotonic() + found.seconds
    here: dict[int, socket.socket] = {}
    try:
        with closing(_listener(host, port)) as listener:
            while len(here) < found.count - 1:
                listener.settimeout(max(until - time.monotonic(), 0.01))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    raise _absent(found, here) from None
                if (number := _welcomed(connection, found.count, facts, here)) is not None:
                    here[number] = connection
        address = _address(host, _free_port(host))
        for connection in here.values():
            send_frame(connection, peers.VALUE, json.dumps({"jax": address}).encode())
    except BaseException as error:
        for connection in here.values():
            _refuse(connection, str(error))
        raise
    return Peers(0, found.count, here), address


def _absent(found: Processes, here: Mapping[int, object]) -> BackendUnavailableError:
    absent = ", ".join(str(n) for n in range(1, found.count or 1) if n not in here)
    return BackendUnavailableError(
        f"of {found.count} processes these did not come to {found.coordinator} within {found.seconds:g} s: "
        f"{absent}"
    )


def _welcomed(
    connection: socket.socket, count: int, facts: Mapping[str, str], here: Mapping[int, object]
) -> int | None:
    """The number of the process that has connected; None for something else, which is sent away.

    Raises:
      OptionError: it is not as process 0 is, or its number is wrong.
    """
    connection.settimeout(HELLO_SECONDS)
    try:
        _, body = read_frame(connection)
        hello = json.loads(body)
        number, its = int(hello["index"]), dict(hello["facts"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        connection.close()
        return None
    line = difference(facts, number, its)
    if line is None and not 1 <= number < count:
        line = f"process id {number} is not one of {count} processes"
    if line is None and number in here:
        line = f"two processes have the process id {number}: give each its own"
    if line is not None:
        _refuse(connection, line)
        raise OptionError(line)
    return number


def _refuse(connection: socket.socket, line: str) -> None:
    with suppress(OSError):
        send_frame(connection, peers.END, json.dumps({"error": line}).encode())
    connection.close()


def _call(found: Processes, facts: Mapping[str, str]) -> tuple[socket.socket, str]:
    """The side of the others: the connection, and the address of JAX's service."""
    until, last = time.monotonic() + found.seconds, "nobody answers"
    while True:
        try:
            connection = socket.create_connection(found.address, timeout=HELLO_SECONDS)
            break
        except OSError as error:  # process 0 may start later
            last = error.strerror or str(error) or type(error).__name__
        if time.monotonic() + RETRY_SECONDS > until:
            raise BackendUnavailableError(
                f"process 0 is not reached at {found.coordinator} within {found.seconds:g} s ({last}): is it "
                "started, and is this the address of its host?"
            )
        time.sleep(RETRY_SECONDS)
    try:
        send_frame(connection, peers.VALUE, json.dumps({"index": found.index, "facts": facts}).encode())
        connection.settimeout(max(until - time.monotonic(), HELLO_SECONDS))
        _, body = read_frame(connection)
        answer = json.loads(body)
    except (OSError, EOFError, ValueError) as error:
        said = f"{error}" or "it has ended"
        raise BackendUnavailableError(
            f"process 0 at {found.coordinator} gives no answer ({said}): is another program there?"
        ) from error
    if "error" in answer:
        raise OptionError(answer["error"])
    return connection, answer["jax"]


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise OptionError(f"coordinator {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OptionError(
            f"process 0 cannot listen on {_address(host, port)} ({error.strerror or error}): the coordinator "
            "is a free port of process 0's own host"
        ) from error
    return listener


def _free_port(host: str) -> int:
    with closing(_listener(host, 0)) as listener:
        return listener.getsockname()[1]


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

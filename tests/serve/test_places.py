"""Where each replica runs, decided before anything is loaded: GPUs, threads, main memory."""

from types import SimpleNamespace

import pytest

pytest.importorskip("msgspec")

from qwen3_moe_jax.core.errors import MemoryPlanError, OptionError
from qwen3_moe_jax.machine import threads
from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.machine.nvidia import NvidiaGpu
from qwen3_moe_jax.serve.engine import places, worker
from qwen3_moe_jax.serve.engine.client import EngineClient
from qwen3_moe_jax.serve.engine.frames import Start

GB = 10**9


@pytest.fixture
def machine(monkeypatch):
    """Sets GPUs, free memory and cores."""
    for name in ("CUDA_VISIBLE_DEVICES", "QWEN3_MOE_CORES", "NPROC"):
        monkeypatch.delenv(name, raising=False)

    def make(*, cards=0, cores=8, free=100 * GB, hidden="", is_partitioned=False):
        found = (NvidiaGpu("H100", "580", "9.0", 80 * GB, is_partitioned=is_partitioned),) * cards
        monkeypatch.setattr(places, "nvidia_gpus", lambda: found)
        monkeypatch.setattr(places, "cards_are_hidden_by", lambda: hidden)
        monkeypatch.setattr(places, "main_memory", lambda: Headroom(free))
        monkeypatch.setattr(places.threads, "cores", lambda: cores)

    return make


def cards_of(start, count):
    return [place.variables["CUDA_VISIBLE_DEVICES"] for place in places.places_for(start, count)]


def test_each_replica_has_a_gpu(machine):
    machine(cards=4)
    assert cards_of(Start(None), 4) == ["0", "1", "2", "3"]
    assert cards_of(Start(None), 2) == ["0", "1"]


def test_each_mesh_has_gpus(machine):
    machine(cards=4)
    assert cards_of(Start(None, mesh="tp=2"), 2) == ["0,1", "2,3"]
    assert cards_of(Start(None, mesh="auto"), 2) == ["0,1", "2,3"]


def test_what_the_user_lets_see_is_shared_out(machine, monkeypatch):
    machine(cards=8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, GPU-ab,1")
    assert cards_of(Start(None), 2) == ["6", "GPU-ab"]
    with pytest.raises(OptionError, match=r"--replicas 4 needs 4 GPUs: 3 can be seen \(6, GPU-ab, 1\)"):
        cards_of(Start(None), 4)


def test_parts_of_gpus_are_named_by_the_user(machine, monkeypatch):
    machine(cards=1, is_partitioned=True)
    with pytest.raises(OptionError, match="CUDA_VISIBLE_DEVICES"):
        cards_of(Start(None), 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    assert cards_of(Start(None), 2) == ["MIG-1", "MIG-2"]


@pytest.mark.parametrize(
    ("mesh", "count", "said"),
    [
        (None, 5, "--replicas 5 needs 5 GPUs: 4 can be seen"),
        ("tp=2,ep=2", 2, "--replicas 2 of --mesh tp=2,ep=2 needs 8 GPUs: 4 can be seen"),
        ("auto", 5, "--replicas 5 of --mesh auto needs 5 GPUs: 4 can be seen"),
    ],
)
def test_too_few_gpus_are_refused(machine, mesh, count, said):
    machine(cards=4)
    with pytest.raises(OptionError, match=said):
        places.places_for(Start(None, mesh=mesh), count)


@pytest.mark.parametrize("start", [Start(None, backend="wgpu"), Start(None, adapter="llvmpipe")])
def test_wgpu_has_one_place(machine, start):
    machine()
    with pytest.raises(OptionError, match="wgpu backend runs one engine"):
        places.places_for(start, 2)


def test_a_cpu_is_shared_out(machine, monkeypatch):
    machine(cores=9, free=21 * GB)
    found = places.places_for(Start(None), 4)
    assert [p.variables for p in found] == [{"QWEN3_MOE_CORES": "2", "NPROC": "2"}] * 4
    (nbytes,) = {p.slot_bytes for p in found}
    assert 2 * GB < nbytes < 21 * GB / 4 / 2  # half of what four models leave
    (mesh,) = {p.variables["NPROC"] for p in places.places_for(Start(None, mesh="tp=4"), 4)}
    assert mesh == "4"  # a thread for each device: they wait for one another
    machine(cards=4, hidden="JAX_PLATFORMS=cpu", cores=1)
    monkeypatch.setenv("NPROC", "8")
    assert places.places_for(Start(None), 2)[1].variables == {"QWEN3_MOE_CORES": "1", "NPROC": "8"}
    machine(cards=4)
    assert "CUDA_VISIBLE_DEVICES" not in places.places_for(Start(None, backend="reference"), 2)[0].variables


def test_models_that_do_not_fit_are_refused_with_numbers(machine):
    machine(free=GB)
    with pytest.raises(MemoryPlanError) as caught:
        places.places_for(Start(None), 3)
    said = str(caught.value)
    assert said.startswith("3 replicas take 1.3")
    assert "1.00 GB free: --replicas 2 would fit" in said
    with pytest.raises(MemoryPlanError, match="--replicas 1 would fit"):
        places.places_for(Start(None, prefix_bytes=GB // 3), 2)
    machine(free=GB // 10)
    with pytest.raises(MemoryPlanError, match="not even one does"):
        places.places_for(Start(None), 2)
    machine(free=None)
    assert places.places_for(Start(None), 2)[0].slot_bytes is None


def test_slots_keep_to_their_share_of_memory():
    """However much is free when the first engine asks."""
    engine = object.__new__(worker.Engine)
    can = SimpleNamespace(open_batch=True)
    runner = SimpleNamespace(platform="cpu", capabilities=can, token_nbytes=1000, free_nbytes=lambda: GB)
    config = SimpleNamespace(max_position_embeddings=4096)
    engine.model = SimpleNamespace(runner=runner, config=config)
    taken = lambda start: sum(row.slots * row.context for row in engine._plan(start))
    alone, shared = taken(Start(None)), taken(Start(None, slot_bytes=9_000_000))
    assert alone == 4 * 4096
    assert shared <= 9000
    runner.free_nbytes = lambda: 10_000_000
    assert taken(Start(None, slot_bytes=GB)) <= 5000


def test_a_child_gets_its_place(monkeypatch):
    """Whatever else this process' environment has; and no engine keeps more cores busy than it is told."""
    monkeypatch.setattr("qwen3_moe_jax.machine.threads._affinity", lambda: set(range(6)))
    monkeypatch.setattr("qwen3_moe_jax.machine.threads._siblings", str)
    monkeypatch.setattr("qwen3_moe_jax.machine.threads._cpu_quota", lambda: 5.0)
    monkeypatch.delenv("QWEN3_MOE_CORES", raising=False)
    assert (threads.cores(), threads.processors()) == (5, 5)
    for text, count in (("2", 2), ("9", 5), ("0", 5), ("x", 5)):
        monkeypatch.setenv("QWEN3_MOE_CORES", text)
        assert (threads.cores(), threads.processors()) == (count, count)
    assert EngineClient(Start(None), variables={"A": "1"})._variables == {"A": "1"}

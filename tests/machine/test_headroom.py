"""Free memory under faked ``/proc`` and ``/sys/fs/cgroup`` trees: the minimum of all limits, and its name."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3_moe_jax.machine import headroom
from qwen3_moe_jax.machine.headroom import Headroom, available_memory, device_headroom, main_memory

MB = 10**6
HOST = 8000 * MB

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


class Tree:
    """A root folder with ``proc`` and ``sys/fs/cgroup``."""

    def __init__(self, root: Path, cgroup: str, mounts: str):
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 99999 kB\nMemAvailable:   {HOST // 1024} kB\n")
        self.write(
            "proc/self/status", f"Name:\tx\nVmSize:\t{1000 * MB // 1024} kB\nVmData:\t{MB // 1024} kB\n"
        )
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", mounts)

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def v2(self, group: str, **files: object) -> None:
        """Files of a group: ``memory_max=5`` is memory.max."""
        for name, value in files.items():
            self.write(f"sys/fs/cgroup/{group}/{name.replace('_', '.', 1)}", f"{value}\n")

    def v1(self, group: str, **files: object) -> None:
        for name, value in files.items():
            self.write(f"sys/fs/cgroup/memory/{group}/{name.replace('_', '.', 1)}", f"{value}\n")

    def free(self, **limits: int) -> Headroom:
        return main_memory(self.root, limits)


@pytest.fixture
def v2(tmp_path) -> Tree:
    return Tree(tmp_path, "0::/user/box/inner\n", V2)


@pytest.fixture
def v1(tmp_path) -> Tree:
    return Tree(tmp_path, "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n", V1)


def test_without_a_limit_it_is_what_the_host_has(v2):
    v2.v2("user/box/inner", memory_max="max", memory_high="max", memory_current=5)
    assert v2.free() == Headroom(HOST // 1024 * 1024)
    assert str(v2.free()) == "main memory, 8.00 GB free"


def test_a_group_of_version_2_counts_what_is_used_but_for_file_pages(v2):
    v2.v2("user/box/inner", memory_max=350 * MB, memory_current=300 * MB)
    v2.v2("user/box/inner", memory_stat=f"anon 1\ninactive_file {200 * MB}\nactive_file {50 * MB}")
    found = v2.free()
    assert found.nbytes == 300 * MB
    assert found.origin == "control group /user/box/inner has memory.max of 0.35 GB"


@pytest.mark.parametrize("group", ["user/box/inner", "user/box", "user", "."])
@pytest.mark.parametrize("file", ["memory_max", "memory_high"])
def test_the_minimum_along_the_path_holds(v2, group, file):
    for other in ("user/box/inner", "user/box", "user"):
        v2.v2(other, memory_max=6000 * MB, memory_high="max", memory_current=0)
    v2.v2(group, **{file: 900 * MB, "memory_current": 100 * MB})
    assert v2.free().nbytes == 800 * MB
    assert file.replace("_", ".") in v2.free().origin


def test_a_container_sees_its_own_group_as_the_root(tmp_path):
    tree = Tree(tmp_path, "0::/\n", V2)
    tree.v2(".", memory_max=500 * MB, memory_current=0)
    assert tree.free().nbytes == 500 * MB
    assert "control group / has" in tree.free().origin


@pytest.mark.parametrize("path", ["/docker/abc", "/docker/abc/job", "/../../elsewhere", "/gone"])
def test_a_mount_that_shows_a_part_of_the_groups(tmp_path, path):
    """Docker on a host of version 1: the mount's root is the container's group."""
    mounts = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    tree = Tree(tmp_path, f"4:memory:{path}\n", mounts)
    tree.v1(".", memory_limit_in_bytes=700 * MB, memory_usage_in_bytes=0)
    tree.v1("job", memory_limit_in_bytes=(1 << 63) - 4096, memory_usage_in_bytes=0)
    assert tree.free().nbytes == 700 * MB


def test_a_group_of_version_1(v1):
    v1.v1(
        "docker/abc",
        memory_limit_in_bytes=350 * MB,
        memory_usage_in_bytes=320 * MB,
        memory_stat=f"cache 1\ntotal_inactive_file {220 * MB}\ntotal_active_file {50 * MB}",
    )
    v1.v1("docker", memory_limit_in_bytes=400 * MB, memory_usage_in_bytes=10 * MB)
    v1.v1(".", memory_limit_in_bytes=9223372036854771712, memory_usage_in_bytes=10 * MB)
    assert v1.free().nbytes == 300 * MB
    assert v1.free().origin == "control group /docker/abc has memory.limit_in_bytes of 0.35 GB"


def test_a_limit_above_the_groups_that_are_seen(v1):
    unlimited = 9223372036854771712
    v1.v1("docker/abc", memory_limit_in_bytes=unlimited, memory_usage_in_bytes=100 * MB)
    v1.v1("docker/abc", memory_stat=f"hierarchical_memory_limit {600 * MB}")
    assert v1.free().nbytes == 500 * MB


def test_limits_of_the_process(v2):
    assert v2.free(RLIMIT_AS=3000 * MB).nbytes == pytest.approx(2000 * MB, abs=1024)
    assert v2.free(RLIMIT_DATA=3000 * MB).nbytes == pytest.approx(2999 * MB, abs=1024)
    assert v2.free(RLIMIT_AS=3000 * MB).origin == "RLIMIT_AS (ulimit -v) is 3.00 GB"


def test_a_group_over_its_limit_has_nothing_left(v2):
    v2.v2("user/box/inner", memory_max=100 * MB, memory_current=300 * MB)
    assert v2.free().nbytes == 0


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("proc/self/cgroup", ""),
        ("proc/self/cgroup", "nonsense\n::\n0\n"),
        ("proc/self/mountinfo", "short line\n - \n1 2 3 4 5 - cgroup2"),
        ("sys/fs/cgroup/user/box/inner/memory.max", "what\n"),
        ("sys/fs/cgroup/user/box/inner/memory.stat", "inactive_file\nx y z\n\n"),
    ],
)
def test_files_that_say_nothing_useful_are_no_limit(v2, path, text):
    v2.v2("user/box/inner", memory_max="max", memory_current="")
    v2.write(path, text)
    assert v2.free().nbytes == HOST // 1024 * 1024


def test_what_a_compiler_takes_is_kept(v2):
    """Of address space also what threads reserve: XLA's end the process where they find none."""
    kept = headroom.COMPILER_BYTES
    free = main_memory(v2.root, {}, compiles=True)
    assert free.nbytes == v2.free().nbytes - kept
    assert f"beside {kept / 1e9:.2f} GB for the compiler" in str(free)
    data = main_memory(v2.root, {"RLIMIT_DATA": 3000 * MB}, compiles=True)
    assert data.nbytes == v2.free(RLIMIT_DATA=3000 * MB).nbytes - kept
    space = main_memory(v2.root, {"RLIMIT_AS": 5000 * MB}, compiles=True)
    assert space.kept >= kept + 9 * headroom.THREAD_ADDRESS_BYTES
    assert space.nbytes == v2.free(RLIMIT_AS=5000 * MB).nbytes - space.kept


def test_no_proc_at_all_asks_the_system(tmp_path):
    assert main_memory(tmp_path, {}).nbytes > 0


def test_the_systems_limits_are_read(monkeypatch, v2):
    resource = pytest.importorskip("resource")
    limits = {resource.RLIMIT_AS: 4000 * MB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    assert main_memory(v2.root).nbytes == pytest.approx(3000 * MB, abs=1024)


GPU = "NVIDIA H100"


@pytest.mark.parametrize(
    ("stats", "on_card", "free", "origin"),
    [
        ({"bytes_limit": 60, "bytes_in_use": 10, "pool_bytes": 20}, 70, 50, "XLA_CLIENT_MEM_FRACTION"),
        ({"bytes_limit": 60, "bytes_in_use": 10, "pool_bytes": 20}, 15, 25, "other programs"),
        # preallocated: nearly nothing is left on the card, all of it in JAX's pool
        ({"bytes_limit": 60, "bytes_in_use": 10, "pool_bytes": 60}, 3, 50, "XLA_CLIENT_MEM_FRACTION"),
        ({"bytes_limit": 60, "bytes_in_use": 0}, None, 60, "XLA_CLIENT_MEM_FRACTION"),
        # an allocator that does not say what its pool holds may have taken all of the card
        ({"bytes_limit": 60, "bytes_in_use": 0}, 3, 60, "XLA_CLIENT_MEM_FRACTION"),
        ({}, 44, 44, "other programs"),
        ({}, None, None, ""),
        ({"bytes_limit": 60, "bytes_in_use": 70, "pool_bytes": 70}, 9, 0, "XLA_CLIENT_MEM_FRACTION"),
    ],
)
def test_a_gpu_has_what_its_allocator_can_get(stats, on_card, free, origin):
    found = device_headroom(GPU, stats, on_card)
    assert (found.nbytes, found.where) == (free, GPU)
    assert origin in found.origin


def test_memory_of_a_device(monkeypatch):
    monkeypatch.setattr(headroom, "free_on_card", {1: 500}.get)
    stats = {"bytes_limit": 10**6, "pool_bytes": 7}
    gpu = SimpleNamespace(platform="gpu", device_kind=GPU, local_hardware_id=1, memory_stats=lambda: stats)
    assert available_memory(gpu).nbytes == 507
    cpu = SimpleNamespace(platform="cpu")
    monkeypatch.setattr(
        headroom, "main_memory", lambda **asked: Headroom(3) if asked == {"compiles": True} else None
    )
    assert available_memory(cpu) == Headroom(3)

"""Compiled programs on disk: found where they are right, compiled again where anything is different."""

import dataclasses
import errno
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from qwen3_moe_jax.jax_backend import program_key, program_store, programs
from qwen3_moe_jax.jax_backend.program_store import ProgramStore
from qwen3_moe_jax.machine import folders

ROOT = Path(__file__).parents[2]


def scaled_sum(x, factor, *, times):
    for _ in range(times):
        x = jnp.tanh(x * factor)
    return x


def new_program() -> programs.Program:
    return programs.Program(scaled_sum, static_argnames=("times",))


pytestmark = pytest.mark.usefixtures("without_jaxs_own_cache")


@pytest.fixture
def store(tmp_path):
    store = ProgramStore(tmp_path / "programs")
    programs.use_store(store)
    yield store
    programs.use_store(None)  # as tests/conftest.py has it


@pytest.fixture
def made():
    """What programs were made, as they are."""
    found: list[programs.Made] = []
    stop = programs.listen(lambda _, what: found.append(what) if what else None)
    yield found
    stop()


def run(program: programs.Program, times: int = 2) -> np.ndarray:
    return np.asarray(program(jnp.arange(6.0), jnp.float32(0.5), times=times))


def sources(made: list[programs.Made]) -> list[str]:
    return [what.source for what in made]


def test_a_second_process_would_find_it_and_trace_nothing(store, made):
    first = run(new_program())
    again = new_program()
    again._jitted = None  # any tracing would fail
    np.testing.assert_array_equal(run(again), first)
    assert sources(made) == ["compiler", "disk"]


def test_one_program_for_each_shape_and_static_argument(store, made):
    program = new_program()
    run(program), run(program), run(program, times=3)
    program(jnp.arange(7.0), jnp.float32(0.5), times=2)
    assert len(made) == 3
    assert len(list(store.folder.iterdir())) == 3


def test_prepare_makes_the_program_that_a_call_then_uses(store, made):
    program = new_program()
    shapes = jax.ShapeDtypeStruct((6,), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    program.prepare(*shapes, times=2)
    assert program.is_ready(*shapes, times=2)
    run(program)
    assert sources(made) == ["compiler"]


@pytest.mark.parametrize(
    "change", ["driver", "code", "device", "versions", "flags", "runtime", "cores", "machine", "settings"]
)
def test_a_changed_environment_compiles_again(store, made, monkeypatch, change):
    run(new_program())
    now = programs.environment()
    monkeypatch.setattr(programs, "environment", lambda: {**now, change: "another"})
    run(new_program())
    assert sources(made) == ["compiler", "compiler"]


def test_flags_of_xla_in_a_file_are_part_of_the_key(monkeypatch, tmp_path):
    file = tmp_path / "flags"
    monkeypatch.setenv("XLA_FLAGS", str(file))
    seen = []
    for text in ("--xla_cpu_enable_fast_math=false", "--xla_cpu_enable_fast_math=true"):
        file.write_text(text)
        program_key._fixed_environment.cache_clear()
        seen.append(programs.environment())
    program_key._fixed_environment.cache_clear()
    assert seen[0] != seen[1]


def test_the_code_is_part_of_the_key():
    facts = programs.environment()
    assert len(facts["code"]) == 16
    assert facts["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "extended"])
def test_a_damaged_file_is_compiled_again_and_replaced(store, made, damage):
    want = run(new_program())
    (path,) = store.folder.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {
            "flip": bytes(content),
            "cut": bytes(content[:-1]),
            "empty": b"",
            "foreign": os.urandom(999),
            "extended": bytes(content) + b"x",
        }[damage]
    )
    np.testing.assert_array_equal(run(new_program()), want)
    assert sources(made) == ["compiler", "compiler"]
    assert len(store.trouble) == 1
    assert "damaged" in store.trouble[0]
    run(new_program())
    assert sources(made)[-1] == "disk"


def test_a_whole_file_that_is_no_program_is_compiled_again(store, made):
    program = new_program()
    run(program)
    (path,) = store.folder.iterdir()
    store.put(path.stem, b"not a pickle")
    run(new_program())
    assert sources(made) == ["compiler", "compiler"]
    assert "could not be loaded" in store.trouble[0]


def test_the_folder_is_the_users_alone(store):
    run(new_program())
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_a_folder_that_others_could_write_to_is_closed_and_emptied(store, made):
    run(new_program())
    store.folder.chmod(0o777)
    run(new_program())
    assert sources(made) == ["compiler", "compiler"]
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert "open to other users" in store.trouble[0]


def test_a_folder_of_somebody_else_is_not_used(store, made, monkeypatch):
    run(new_program())
    own = os.stat(store.folder)
    facts = [*own[:4], os.getuid() + 1, *own[5:]]  # st_uid
    monkeypatch.setattr(program_store.os, "lstat", lambda _: os.stat_result(facts))
    run(new_program())
    assert sources(made) == ["compiler", "compiler"]
    assert "not a folder of this user" in store.trouble[0]


def test_a_link_to_another_folder_is_not_used(store, made, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    store.folder.symlink_to(tmp_path / "elsewhere")
    run(new_program())
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_read_only_place_says_so_once_and_compiles(tmp_path, made):
    blocker = tmp_path / "file"
    blocker.write_text("")
    store = ProgramStore(blocker / "programs")  # no folder can be made below a file
    programs.use_store(store)
    try:
        run(new_program()), run(new_program())
    finally:
        programs.use_store(None)
    assert sources(made) == ["compiler", "compiler"]
    assert len(store.trouble) == 1
    assert "Not a directory" in store.trouble[0]


def test_a_place_that_cannot_be_written_is_still_read(store, monkeypatch):
    """A cache that came with an image: the time of its last use cannot be noted."""

    def refused(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    store.put("a", b"program")
    monkeypatch.setattr(program_store.os, "utime", refused)
    assert store.get("a") == b"program"
    assert not store.trouble
    image = ProgramStore(store.folder, is_read_only=True)
    store.folder.chmod(0o755)  # of root, as an image has it
    monkeypatch.setattr(program_store.os, "geteuid", lambda: os.getuid() + 1000 * (os.getuid() == 0))
    assert image.get("a") == b"program"
    assert not image.put("b", b"program")
    image.delete("a")
    assert image.has("a")
    assert not image.trouble


def test_programs_of_a_cache_that_can_only_be_read_are_used(tmp_path, made, monkeypatch, caplog):
    def as_another_process() -> None:
        monkeypatch.setattr(programs, "_is_chosen", False)
        assert programs.use_default_store()
        run(new_program())

    def refused(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv(programs.STORE_VARIABLE, "on")
    monkeypatch.setenv(folders.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(folders, "_said", set())
    monkeypatch.setattr(programs, "_store", None)
    as_another_process()
    assert programs.keeps_on_disk()
    monkeypatch.setattr(folders.tempfile, "TemporaryFile", refused)
    as_another_process()
    assert sources(made) == ["compiler", "disk"]
    assert not programs.keeps_on_disk()
    assert [r.getMessage()[:10] for r in caplog.records] == ["the cache "]


def a_pipe(path: Path, elsewhere: Path) -> None:
    os.mkfifo(path)


def a_link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def a_link_to_nothing(path: Path, elsewhere: Path) -> None:
    path.symlink_to("/no/such")


def a_huge_file(path: Path, elsewhere: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def an_empty_file(path: Path, elsewhere: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("plant", [a_pipe, a_link, a_link_to_nothing, a_huge_file, an_empty_file])
def test_what_is_no_file_of_a_program_is_not_read_and_replaced(tmp_path, plant):
    elsewhere = ProgramStore(tmp_path / "elsewhere")
    elsewhere.put("a", b"of somebody else")
    store = ProgramStore(tmp_path / "programs")
    store.put("b", b"1")
    plant(store.folder / "a.program", elsewhere.folder / "a.program")
    assert store.get("a") is None
    assert store.put("a", b"program")
    assert store.get("a") == b"program"
    assert elsewhere.get("a") == b"of somebody else"


def test_a_folder_in_the_place_of_a_program_stops_nobody(store, made):
    run(new_program())
    (file,) = store.folder.glob("*.program")
    file.unlink()
    file.mkdir()
    run(new_program())
    assert sources(made) == ["compiler", "compiler"]


def test_a_full_disk_leaves_no_half_file(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(program_store.os, "replace", full)
    run(new_program())
    assert list(store.folder.iterdir()) == []
    assert "No space left" in store.trouble[0]


def test_the_ones_used_longest_ago_make_room(tmp_path):
    store = ProgramStore(tmp_path / "programs", max_bytes=399)
    for age, key in enumerate("abc"):
        store.put(key, bytes(60))
        os.utime(tmp_path / "programs" / f"{key}.program", (age, age))
    assert store.get("a") is not None  # used now
    store.put("d", bytes(160))
    assert [store.get(key) is not None for key in "abcd"] == [True, False, False, True]
    assert store.nbytes() <= 399
    assert not store.put("e", bytes(500))


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    store = ProgramStore(tmp_path / "programs")
    store.put("a", b"1")
    left, recent = store.folder / "old.part", store.folder / "new.part"
    left.write_bytes(b"half"), recent.write_bytes(b"half")
    os.utime(left, (0, 0))
    store.put("b", b"2")
    assert [left.exists(), recent.exists()] == [False, True]


def test_two_processes_at_once(tmp_path):
    """Both write the same program to one folder; a third finds it."""
    code = """
import sys, jax.numpy as jnp
from pathlib import Path
from tests.model import test_programs as t
from qwen3_moe_jax.jax_backend import programs
found = []
programs.listen(lambda _, what: found.append(what) if what else None)
programs.use_store(t.ProgramStore(Path(sys.argv[1])))
t.run(t.new_program())
print(found[0].source)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "programs")]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    start = lambda: subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    both = [start(), start()]
    assert all(process.communicate()[0].strip() in ("compiler", "disk") for process in both)
    assert start().communicate()[0].strip() == "disk"


def test_a_program_on_disk_runs_where_there_are_two_devices(tmp_path):
    code = """
import sys, jax
from tests.model import test_programs as t
jax.config.update("jax_num_cpu_devices", 2)
t.programs.use_store(t.ProgramStore(t.Path(sys.argv[1])))
t.programs.listen(lambda _, what: what and print(what.source))
t.run(t.new_program()), t.run(t.new_program())
"""
    command = [sys.executable, "-c", code, str(tmp_path / "programs")]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    output = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert output.split() == ["compiler", "disk"]


@dataclasses.dataclass(frozen=True)
class Settings:
    names: frozenset[str]
    dtype: np.dtype


def test_a_fingerprint_is_the_same_in_every_process(monkeypatch):
    monkeypatch.setattr(Settings, "__module__", "qwen3_moe_jax.settings")
    value = Settings(frozenset({"b", "a", "c"}), np.dtype("float32"))
    assert programs.fingerprint(value) == [
        "Settings",
        ["names", ["set", '"a"', '"b"', '"c"']],
        ["dtype", "float32"],
    ]


def a_users_function(x):
    return x


@pytest.mark.parametrize("value", [Settings(frozenset(), np.dtype("int8")), a_users_function, object()])
def test_code_of_others_has_no_fingerprint(value):
    """The same name may stand for other code tomorrow."""
    with pytest.raises(TypeError, match="no fingerprint"):
        programs.fingerprint(value)


def test_what_has_no_fingerprint_is_refused_and_still_runs(store, made):
    with pytest.raises(TypeError, match="no fingerprint"):
        programs.fingerprint(lambda: 0)
    program = programs.Program(lambda x, f: f(x), static_argnames=("f",))
    assert float(program(jnp.float32(2), lambda x: x + 1)) == 3
    assert not store.folder.exists()


def test_what_comes_from_jaxs_own_cache_is_not_written_again(store, made, tmp_path):
    """Serialized twice, a program of a CPU lacks functions and fails when it runs."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()
    try:
        run(new_program())
        for path in store.folder.iterdir():
            path.unlink()
        jax.clear_caches()
        run(new_program())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert sources(made) == ["compiler", "compiler"]
    assert list(store.folder.iterdir()) == []


def test_what_ran_is_known_of_a_program_from_disk(store):
    from qwen3_moe_jax.kernels_pallas import implementations

    def noted(x):
        implementations.note("some_op", "xla", ())
        return x + 1

    with implementations.recording() as first:
        programs.Program(noted)(jnp.float32(1))
    again = programs.Program(noted)
    again._jitted = None
    with implementations.recording() as second:
        again(jnp.float32(1))
    assert [ran.op for ran in second] == [ran.op for ran in first] == ["some_op"]


def test_inside_another_jit_it_is_part_of_that_program(store, made):
    program = new_program()
    jax.jit(lambda x: program(x, jnp.float32(0.5), times=2))(jnp.arange(3.0))
    assert made == []


@pytest.mark.parametrize(
    "fault", [jax.errors.JaxRuntimeError("UNIMPLEMENTED"), MemoryError(), pickle.PicklingError()]
)
def test_a_program_that_cannot_be_written_runs_all_the_same(store, made, monkeypatch, fault):
    def fail(_):
        raise fault

    monkeypatch.setattr(programs.serialize_executable, "serialize", fail)
    assert float(new_program()(jnp.zeros(2), 1.0, times=1).sum()) == 0
    assert store.nbytes() == 0

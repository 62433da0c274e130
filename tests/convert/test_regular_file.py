"""Reading at an offset with what every system has, and without what some do not have."""

import os
import threading

import pytest

from qwen3_moe_jax.convert import regular_file
from qwen3_moe_jax.convert.errors import ModelFileError
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.regular_file import Descriptor, RegularFile

DATA = bytes(range(256)) * 40
UNIX_ONLY = ("preadv", "O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY")


@pytest.fixture(params=["pread", "seek and read"])
def system(request, monkeypatch):
    """This system, and one like Windows."""
    if request.param != "pread":
        for name in UNIX_ONLY:
            monkeypatch.delattr(os, name)
    return request.param


@pytest.fixture
def file(tmp_path, system):
    path = tmp_path / "data"
    path.write_bytes(DATA)
    found = RegularFile(path)
    yield found
    found.close()


def test_any_part_in_any_order(file):
    for start, count in [(5000, 300), (0, 1), (len(DATA) - 7, 7), (26, 100), (9, 0)]:
        assert file.read(count, start) == DATA[start : start + count]


def test_two_threads_that_close_at_once_close_one_file(monkeypatch):
    """The second comes while the system closes; the number may be another file's by then."""
    descriptor, closed = Descriptor(12345), []

    def close(number: int) -> None:
        closed.append(number)
        if len(closed) < 5:
            descriptor.close()

    monkeypatch.setattr(os, "close", close)
    descriptor.close()
    assert closed == [12345]


def test_a_closed_file_is_an_error_that_names_it(file):
    file.close()
    for read in (lambda: file.read(1, 0), file.check_unchanged):
        with pytest.raises(ModelFileError, match="E_OPEN.*data: cannot be read"):
            read()


def test_reads_from_many_threads_do_not_mix(file):
    wrong = []

    def read(number: int) -> None:
        for i in range(200):
            start = (number * 997 + i * 31) % 9000
            if file.read(500, start) != DATA[start : start + 500]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_early_end_and_a_change_are_seen(file):
    with pytest.raises(ModelFileError, match="E_SHORT_READ.*ends 10 bytes early"):
        file.read(20, len(DATA) - 10)
    file.check_unchanged()
    os.truncate(file.path, 5)
    with pytest.raises(ModelFileError, match="E_CHANGED"):
        file.check_unchanged()


def test_large_reads_come_in_parts(file, monkeypatch):
    monkeypatch.setattr(regular_file, "MAX_READ_BYTES", 100)
    assert file.read(1234, 17) == DATA[17 : 17 + 1234]


def test_what_is_no_file_is_refused(tmp_path, system):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelFileError, match="E_OPEN"):
            RegularFile(path)


def test_windows_reads_bytes_as_they_are(monkeypatch):
    monkeypatch.setattr(os, "O_BINARY", 0x8000, raising=False)
    assert regular_file._open_flags() & 0x8000


def test_a_model_opens_where_preadv_is_missing(system):
    from qwen3_moe_jax.loader import embedded_model

    with open_model(embedded_model()) as source:
        path = next(iter(source.types))
        assert source.tensor(path).shape


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 2500, "a\0b"], ids=["long", "deep", "NUL"])
def test_a_name_that_no_file_can_have_is_refused_as_a_file_is(name):
    from qwen3_moe_jax.loader import model_path

    for refuse in (model_path, open_model):
        with pytest.raises(ModelFileError, match=r"^E_OPEN: [^:]{3,90}: cannot be opened: [^:]{9,40}$"):
            refuse(name)


def test_a_packed_checkpoint_is_refused_in_one_line_there(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "supports_dir_fd", frozenset())
    with pytest.raises(ModelFileError, match=r"E_CHECKPOINT: .*on Linux and macOS; name the \.gguf file"):
        open_model(tmp_path)

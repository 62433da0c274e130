"""Checks that passed: remembered where it can be done, and nobody is stopped where it cannot."""

import json
import os

import pytest

from qwen3_moe_jax.machine.remembered import MAX_REMEMBERED, remember, remembered


def test_keys_come_back_and_the_oldest_go(tmp_path):
    path = tmp_path / "new" / "keys.json"
    for number in range(3):
        remember(path, f"{number}")
    assert remembered(path) == ["0", "1", "2"]
    path.write_text(json.dumps([f"{n}" for n in range(MAX_REMEMBERED)]))
    remember(path, "last")
    assert len(remembered(path)) == MAX_REMEMBERED
    assert remembered(path)[-1] == "last"


def a_pipe(path):
    os.mkfifo(path)


def a_folder(path):
    path.mkdir()


def a_huge_file(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def nested(path):
    path.write_text("[" * 100_000)


def no_utf_8(path):
    path.write_bytes(b"\xff\xfe")


def other_json(path):
    path.write_text('{"a": [1, 2]}')


@pytest.mark.parametrize("plant", [a_pipe, a_folder, a_huge_file, nested, no_utf_8, other_json])
def test_what_is_no_list_of_keys_is_empty(tmp_path, plant):
    plant(tmp_path / "keys.json")
    assert remembered(tmp_path / "keys.json") == []
    remember(tmp_path / "keys.json", "a")  # a folder stays; the others are replaced
    assert remembered(tmp_path / "keys.json") in (["a"], [])


def test_a_place_that_cannot_be_written_is_no_fault(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    remember(tmp_path / "file" / "keys.json", "a")
    assert remembered(tmp_path / "file" / "keys.json") == []

"""A model that several processes share gives what it gives in one, and each reads its own part alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from qwen3_moe_jax.convert.checkpoint_writer import write_checkpoint
from qwen3_moe_jax.convert.open_model import open_model
from qwen3_moe_jax.convert.packed import packed_nbytes
from qwen3_moe_jax.core.sampling import Sampling
from qwen3_moe_jax.jax_backend.sharded_params import read_parts
from qwen3_moe_jax.loader import make_runner
from qwen3_moe_jax.testing.random_models import write_random_gguf
from tests.machine.test_processes import free_address
from tests.model.run_in_process import PIECE_BYTES, PROMPTS
from tests.model.run_on_mesh import NEW_TOKENS, PROMPT
from tests.model.test_mesh import CONFIG, bytes_read, shards
from tests.tolerances import MESH_LOGITS

pytestmark = pytest.mark.timeout(400)

SECONDS = 300
"""A process that takes longer hangs; it takes about 20 on two cores."""

QUICKLY = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "QWEN3_MOE_NATIVE": "off"}
"""Programs that run for milliseconds are compiled quickly, not well."""

MESH = "tp=2,ep=2"

GREEDY = ("--temperature", "0", "--no-gate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def file(folder) -> Path:
    path = folder / "model.gguf"
    write_random_gguf(path, CONFIG, mix="q8_0", seed=5)
    return path


@pytest.fixture(scope="module")
def checkpoint(folder, file) -> Path:
    path = folder / "checkpoint"
    with pytest.MonkeyPatch.context() as patched, open_model(file) as source:
        for module in ("manifest", "checkpoint_source"):
            patched.setattr(f"qwen3_moe_jax.convert.{module}.PIECE_BYTES", PIECE_BYTES)
        write_checkpoint(source, path)
    return path


def started(stack: ExitStack, *command: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-u", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=os.environ | QUICKLY,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def ended(*running: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    until = time.monotonic() + SECONDS
    found = []
    for process in running:
        out, err = process.communicate(timeout=until - time.monotonic())
        found.append((process.returncode, out, err))
    return found


@pytest.fixture(scope="module")
def found(folder, file, checkpoint) -> list[dict]:
    """What each of two processes says, which have two devices each."""
    script, address = Path(__file__).with_name("run_in_process.py"), free_address()
    outs = [folder / f"{index}.json" for index in range(2)]
    with ExitStack() as stack:
        both = [
            started(stack, script, address, 2, index, MESH, file, checkpoint, out)
            for index, out in enumerate(outs)
        ]
        for code, _, err in ended(*both):
            assert code == 0, err
    return [json.loads(out.read_text()) for out in outs]


@pytest.fixture(scope="module")
def reference(file):
    with open_model(file) as source:
        yield make_runner(source, "reference", max_context=64)


def test_all_give_the_same(found):
    one, other = ({**facts, "read": None} for facts in found)
    assert one == other


def test_logits_are_those_of_the_reference(found, reference):
    expected, actual = reference.forward(PROMPT), np.asarray(found[0]["logits"])
    bound = MESH_LOGITS * np.abs(expected.logits).max()
    np.testing.assert_allclose(actual, expected.logits, atol=bound, rtol=0)
    assert found[0]["expert_ids"] == expected.expert_ids.tolist()
    np.testing.assert_allclose(found[0]["scores"], reference.log_likelihoods(PROMPT), atol=1e-4, rtol=0)


def test_tokens_are_those_of_the_reference(found, reference):
    greedy = Sampling(temperature=0)
    write = lambda prompt: list(reference.stream(prompt, max_tokens=NEW_TOKENS, sampling=greedy))
    assert found[0]["tokens"] == write(PROMPT)
    assert found[0]["batch"] == [write(prompt) for prompt in PROMPTS]
    assert found[0]["of checkpoint"] == found[0]["tokens"]


def test_seeds_are_those_of_process_0(found):
    for facts in found:
        given, of_first = facts["sampled"]
        assert given == of_first != facts["tokens"]


def test_the_mesh_counts_the_devices_of_all(found):
    assert found[0]["devices"] == [2, 4]
    assert "4 devices of 2 processes, each with 2 of 8 heads" in found[0]["mesh"]


def test_each_plans_and_holds_its_own_devices_part(found):
    for facts in found:
        assert len(facts["nbytes"]) == 2
        assert facts["planned"] == sum(facts["nbytes"])


def test_weights_come_back_from_all_processes(found):
    assert found[0]["wrong rows"] == []


@pytest.mark.parametrize("kind", ["file", "checkpoint"])
def test_each_reads_its_own_rows_alone(found, file, kind, monkeypatch):
    """Of a file what its devices have, of ``o_proj`` and ``down_proj`` whole rows."""
    split = shards(MESH, processes=2)
    with open_model(file) as source:
        read = bytes_read(source, monkeypatch)
        for path in source.paths():
            read_parts(source, split, path)
        whole = source.nbytes
        packed = sum(packed_nbytes(source.types[p], source.specs[p].shape) for p in source.paths())
    for facts in found:
        if kind == "file":
            assert facts["read"][kind] == sum(read)
            assert facts["read"][kind] < 0.75 * whole
        else:  # in whole pieces
            assert facts["read"][kind] < 0.75 * packed


def test_what_differs_is_named(found):
    line = "process 1 has another context than process 0 (33, 32): every process needs the same"
    assert found[0]["difference"] == line


# The command line


def commands(stack: ExitStack, *arguments: object) -> list[subprocess.Popen[str]]:
    """The command in two processes with a device each."""
    address = free_address()
    group = lambda index: ("--coordinator", address, "--num-processes", 2, "--process-id", index)
    return [
        started(stack, "-m", "qwen3_moe_jax", *arguments, "--mesh", "ep=2", *group(index))
        for index in range(2)
    ]


def test_generate_writes_the_tokens_of_one_process_once(file, reference):
    with ExitStack() as stack:
        both = commands(stack, "generate", "ab", "-m", file, "-n", 5, "-c", 64, "--json", "-q", *GREEDY)
        (code, out, err), other = ended(*both)
    assert code == 0, err
    assert other == (0, "", "")
    facts = json.loads(out)
    greedy = Sampling(temperature=0)
    expected = reference.stream(facts["prompt_token_ids"], max_tokens=5, sampling=greedy)
    assert facts["token_ids"] == list(expected)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_line(victim):
    with ExitStack() as stack:
        both = commands(stack, "generate", "import os\n", "-n", 3000, "-c", 3100, "-q", *GREEDY)
        stack.callback(threading.Timer(SECONDS, both[0].kill).cancel)
        assert both[0].stdout is not None
        both[0].stdout.read(1)  # text comes
        os.kill(both[victim].pid, signal.SIGKILL)
        killed_at = time.monotonic()
        code, _, err = ended(both[1 - victim])[0]
        assert time.monotonic() - killed_at < 30
    assert code == 1
    line = f"qwen3-moe: process {victim} of 2 has ended without a word: this process ends too"
    assert line in err.splitlines()  # beside what XLA writes of a lost connection


def test_other_files_are_refused(file, folder):
    other = folder / "other.gguf"
    write_random_gguf(other, CONFIG, mix="q8_0", seed=6)
    with ExitStack() as stack:
        address = free_address()
        both = [
            started(
                stack,
                *("-m", "qwen3_moe_jax", "generate", "ab", "-m", path, "--mesh", "ep=2", "-q", "-c", 64),
                *("--coordinator", address, "--num-processes", 2, "--process-id", index),
            )
            for index, path in enumerate((file, other))
        ]
        results = ended(*both)
    for code, out, err in results:
        assert code == 2
        assert out == ""
        assert "process 1 has another model file than process 0" in err
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num-processes", 2), "belong together: give all"),
        (("--coordinator", "x", "--num-processes", 2, "--process-id", 0), "'x' is not such as"),
        (("--coordinator", "x:1", "--num-processes", 2, "--process-id", 2), "process id 2 is not one of 2"),
        (("--coordinator", "x:1", "--num-processes", 2, "--process-id", 0), "--mesh says how it is split"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with ExitStack() as stack:
        mesh = () if "mesh" in words else ("--mesh", "ep=2")
        process = started(stack, "-m", "qwen3_moe_jax", "generate", "ab", *mesh, *options)
        ((code, out, err),) = ended(process)
    assert (code, out) == (2, "")
    assert words in err

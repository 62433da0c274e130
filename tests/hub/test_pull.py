"""Downloads from a hub on this machine: choice, room, resumption, every fault in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub import constants

import qwen3_moe_jax as q3
from qwen3_moe_jax import loader
from qwen3_moe_jax.cli import main
from qwen3_moe_jax.core.errors import HubError, MemoryPlanError, OptionError, OutputFileError
from qwen3_moe_jax.core.exit_codes import ExitCode
from qwen3_moe_jax.hub import pull as pulling
from qwen3_moe_jax.hub.faults import fault
from qwen3_moe_jax.hub.listing import Listing, RemoteFile, Variant, ask, files_in
from qwen3_moe_jax.hub.names import parse
from qwen3_moe_jax.hub.pull import choose, pull
from qwen3_moe_jax.machine.headroom import Headroom
from tests.hub.conftest import REPO
from tests.hub.hub_server import COMMIT

Q4 = f"hf:{REPO}:Q4_K_M"
Usage = namedtuple("Usage", "total used free")


def test_a_model_is_pulled_once_and_then_read_from_the_cache(hub, small_gguf, capsys):
    path = loader.model_path(Q4)
    assert path.read_bytes() == small_gguf
    assert path.parent.name == COMMIT
    shown = capsys.readouterr().err
    assert "licence apache-2.0" in shown
    assert "free)" in shown
    asked = len(hub.log)
    assert loader.model_path(Q4) == loader.model_path(f"hf:{REPO}") == path
    assert len(hub.log) == asked
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.part*"))


def test_a_name_loads_from_python(hub):
    with q3.load(Q4, backend="reference", gate=False) as model:
        assert model.config.num_hidden_layers


def test_shards_come_together(hub):
    path = pull(parse(f"hf:{REPO}:Q6_K"), quiet=True)
    assert path.name == "Small-Q6_K-00001-of-00002.gguf"
    assert path.with_name("Small-Q6_K-00002-of-00002.gguf").read_bytes() == b"b" * 500_000


def test_the_token_goes_to_the_hub_alone(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(parse(Q4), quiet=True)
    assert hub.tokens == [None]


def test_the_choice_follows_the_memory(hub):
    listing = ask(parse(f"hf:{REPO}"))
    work = 420_000_000
    assert choose(listing, Headroom(work + 10_000_000)).quant == "Q4_K_M"
    assert choose(listing, Headroom(None)).quant == "Q4_K_M"
    q4 = listing.named(parse(Q4)).nbytes
    by_size = sorted((v.nbytes, v.quant) for v in listing.variants if v.quant != "IQ4_XS")
    assert choose(listing, Headroom(pulling.plan_of(listing.named(parse(Q4))).total)).quant == "Q4_K_M"
    if by_size[0][0] < q4:
        assert choose(listing, Headroom(pulling.plan_of(listing.named(parse(Q4))).total - 1)).nbytes < q4
    with pytest.raises(
        MemoryPlanError, match=r"does not fit main memory, 0.00 GB free: .*downloads it all the same"
    ):
        choose(listing, Headroom(1000))


def test_the_largest_that_fits_little_memory_is_chosen():
    """The sizes are those of a 30B model, in GB."""
    sizes = {"IQ1_S": 6.4, "IQ2_M": 10.2, "Q2_K": 11.3, "Q3_K_M": 14.7, "IQ4_XS": 16.4, "Q4_K_M": 18.6}
    variants = [
        Variant(quant, (RemoteFile(f"x-{quant}.gguf", int(gb * 1e9)),)) for quant, gb in sizes.items()
    ]
    listing = Listing("a/b", "c", tuple(variants))
    for free, expected in ((24, "Q4_K_M"), (18, "IQ4_XS"), (16, "Q3_K_M"), (13, "Q2_K"), (8, "IQ1_S")):
        assert choose(listing, Headroom(int(free * 1e9))).quant == expected


def test_near_names_are_offered(hub):
    with pytest.raises(
        OptionError, match=r"no Q4_K_L; did you mean Q4_K_M.*it has .*Q8_0 \(3.0 MB\)"
    ) as error:
        pull(parse(f"hf:{REPO}:Q4_K_L"))
    assert "Q5_K_M" not in str(error.value)  # a shard is missing
    with pytest.raises(OptionError, match=r"no file small-q8_0.gguf; did you mean Small-Q8_0.gguf"):
        pull(parse(f"hf:{REPO}/small-q8_0.gguf"))


def test_a_full_disk_is_told_before(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1_000_000))
    with pytest.raises(OutputFileError, match=r"takes 0.00 GB more, .* has 0.00 GB free: .*HF_HUB_CACHE"):
        pull(parse(f"hf:{REPO}:Q8_0"), quiet=True)
    assert not hub.gets()


def test_a_lost_connection_goes_on_where_it_was(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.cut_after = 1_000_000
    path = pull(parse(f"hf:{REPO}:Q8_0"), quiet=True)
    assert path.stat().st_size == 3_000_000
    starts = [int(r.removeprefix("bytes=").rstrip("-")) for r in hub.gets()[1:]]
    assert starts == sorted(starts)
    assert starts[0] > 0


def test_a_server_without_ranges_sends_it_again(hub, small_gguf):
    _leave_partial(small_gguf, 100_000)
    hub.ignores_ranges = True
    assert pull(parse(Q4), quiet=True).read_bytes() == small_gguf


def _leave_partial(data: bytes, nbytes: int) -> None:
    import hashlib

    folder = Path(constants.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}" / "blobs"
    folder.mkdir(parents=True)
    (folder / f"{hashlib.sha256(data).hexdigest()}.part").write_bytes(data[:nbytes])


def test_wrong_bytes_are_not_kept(hub):
    hub.damaged = True
    with pytest.raises(HubError, match="not those that the hub announced"):
        pull(parse(Q4), quiet=True)
    assert not [p for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.is_file() and p.suffix == ".part"]
    assert not files_in(Path(constants.HF_HUB_CACHE))


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
from qwen3_moe_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_was_ended_goes_on(hub, number):
    cache = constants.HF_HUB_CACHE
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": "1"}
    hub.stall_after = 1_000_000
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "pull", f"hf:{REPO}:Q8_0"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (parts := [p for p in Path(cache).rglob("*.part") if p.stat().st_size]):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    errors = process.communicate()[1]
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert process.returncode == ExitCode.INTERRUPTED
        assert "are kept: the same command goes on from there" in errors
    kept = parts[0].stat().st_size
    assert 0 < kept <= 1_000_000
    hub.stall_after = None
    hub.log.clear()
    assert pull(parse(f"hf:{REPO}:Q8_0"), quiet=True).read_bytes() == bytes(3_000_000)
    assert hub.gets() == [f"bytes={kept}-"]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "GatedRepo", r"is gated: accept its licence at http://127.*HF_TOKEN"),
        (401, "RepoNotFound", r"has no repository Owner/Small-GGUF"),
        (401, "", r"HF_TOKEN"),
        (403, "", r"403\): accept its licence"),
        (404, "RevisionNotFound", r"no such revision"),
        (500, "", r"status 500: try again later"),
        (429, "", r"fewer requests"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, status, code, expected, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.status = (status, code)
    assert main(["pull", Q4]) == ExitCode.HUB
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    import re

    assert re.search(expected, line), line


def test_a_repository_without_gguf_says_what_to_look_for(hub):
    with pytest.raises(HubError, match=r"no GGUF file \(it has .safetensors\).*hf:Owner/Empty-GGUF"):
        pull(parse("hf:Owner/Empty"))
    with pytest.raises(HubError, match="has no repository Owner/Nothing"):
        pull(parse("hf:Owner/Nothing"))
    with pytest.raises(HubError, match="no such revision"):
        pull(parse(f"hf:{REPO}@v9"))


def test_no_network_and_no_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127.0.0.1:9 cannot be reached"):
        pull(parse(Q4))


def test_offline_takes_the_cache_and_says_so(hub, monkeypatch, capsys):
    path = pull(parse(Q4), quiet=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull(parse(Q4)) == path
    assert "taken from the cache" in capsys.readouterr().err
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        pull(parse(f"hf:{REPO}:Q8_0"))


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (OSError(28, "No space left on device"), OutputFileError, "the disk is full"),
        (PermissionError(13, "Permission denied"), OutputFileError, "may not be written"),
        (TimeoutError("timed out"), HubError, "does not answer in time"),
        (OSError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), HubError, "certificate .* SSL_CERT_FILE"),
        (OSError("Consistency check failed: file"), HubError, "fewer bytes"),
    ],
)
def test_faults_of_disk_and_network(error, kind, expected):
    found = fault("A/B", error)
    assert type(found) is kind
    import re

    assert re.search(expected, str(found))


def test_a_disk_that_fills_up_is_one_line(hub, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    assert main(["pull", Q4, "-q"]) == ExitCode.OUTPUT
    assert "the disk is full" in capsys.readouterr().err


def test_the_list_of_a_repository(hub, capsys):
    assert main(["pull", "--list", "--json", f"hf:{REPO}"]) == 0
    models = {m["quant"]: m for m in json.loads(capsys.readouterr().out)["models"]}
    assert models["Q6_K"]["nbytes"] == 2_000_000
    assert len(models["Q6_K"]["files"]) == 2
    assert models["Q8_0"]["runs"]
    assert models["Q8_0"]["fits"]
    assert main(["pull", "--list", f"hf:{REPO}"]) == 0
    assert "licence apache-2.0" in capsys.readouterr().out
    assert not hub.gets()


def test_help_and_import_are_free_of_the_hub():
    code = (
        "import sys; import qwen3_moe_jax.loader; from qwen3_moe_jax.cli import main\n"
        "try: main(['pull', '--help'])\nfinally: assert 'huggingface_hub' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "HF_TOKEN" in done.stdout


def test_commands_take_names_and_addresses(hub, tmp_path, capsys):
    page = f"{hub.url}/{REPO}/blob/main/Small-Q4_K_M.gguf"
    assert main(["inspect", "--json", "--no-estimates", "-m", page]) == 0
    assert json.loads(capsys.readouterr().out)["config"]
    ask = ("x", "-n", "1", "--backend", "reference", "--no-gate", "-q")
    assert main(["generate", "-m", Q4, *ask]) == 0
    assert main(["generate", "-m", REPO, *ask]) == ExitCode.USAGE
    assert f"did you mean hf:{REPO}?" in capsys.readouterr().err
    assert main(["generate", "-m", f"hf:{REPO}:Q9_K", *ask]) == ExitCode.USAGE
    assert "has no Q9_K" in capsys.readouterr().err

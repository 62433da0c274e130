"""What a fake ``nvidia-smi`` prints, and what is made of it."""

import pytest

from qwen3_moe_jax.machine import nvidia
from qwen3_moe_jax.machine.headroom import Headroom
from qwen3_moe_jax.machine.nvidia import NvidiaGpu, nvidia_report
from qwen3_moe_jax.machine.probe import Machine, describe_card, diagnose

GB80 = 81559 << 20


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a program that runs a shell script at the head of the path."""

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    nvidia._ask.cache_clear()
    yield install
    nvidia._ask.cache_clear()


def printing(text: str) -> str:
    return f"cat <<'END'\n{text}\nEND"


CARDS = {
    "580.65.06, 9.0, 81559, 80000, Disabled, NVIDIA H100 80GB HBM3": NvidiaGpu(
        "NVIDIA H100 80GB HBM3", "580.65.06", "9.0", GB80, 80000 << 20
    ),
    "580.65.06, 12.1, [N/A], [N/A], [N/A], NVIDIA GB10": NvidiaGpu("NVIDIA GB10", "580.65.06", "12.1", None),
    "[N/A], [N/A], [Not Supported], [Not Supported], [N/A], Orin (nvgpu)": NvidiaGpu(
        "Orin (nvgpu)", "", "", None
    ),
    "N/A, N/A, N/A, N/A, N/A, N/A": NvidiaGpu("NVIDIA GPU", "", "", None),
    "[Unknown Error], 9.0, 81559 MiB, ERR!, Enabled, NVIDIA H100, MIG": NvidiaGpu(
        "NVIDIA H100, MIG", "", "9.0", GB80, None, is_partitioned=True
    ),
    "r580-beta, 9.0, 81559, 1, Disabled, NVIDIA H100": NvidiaGpu(
        "NVIDIA H100", "r580-beta", "9.0", GB80, 1 << 20
    ),
    "580, 9.0, 8\u0661\u0665, 81.559, Disabled, NVIDIA\u001b[31m H100": NvidiaGpu(
        "NVIDIA?[31m H100", "580", "9.0", None
    ),
}


@pytest.mark.parametrize("line", CARDS, ids=[str(i) for i in range(len(CARDS))])
def test_a_card_is_listed_whatever_is_printed_of_it(smi, line):
    smi(printing(line))
    assert nvidia_report().gpus == (CARDS[line],)
    machine = Machine(
        (3, 12), {"jax": "0.11.2", "jax-cuda13-plugin": "0.11.2"}, nvidia_gpus=nvidia_report().gpus
    )
    lines = [f for f in diagnose(machine) if f.subject == "NVIDIA GPU"]
    assert len(lines) == 1
    assert lines[0].text.startswith(CARDS[line].name)
    assert lines[0].text.isprintable()


def test_several_cards(smi):
    smi(printing("\n".join(CARDS)))
    assert nvidia_report().gpus == tuple(CARDS.values())


def test_an_old_driver_that_does_not_know_every_field(smi):
    smi(
        'case "$1" in *compute_cap*)\n'
        '  echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2;; esac\n'
        'echo "470.82.01, 16160, 16000, Tesla V100-SXM2-16GB"'
    )
    (card,) = nvidia_report().gpus
    assert (card.name, card.driver, card.capability) == ("Tesla V100-SXM2-16GB", "470.82.01", "")
    assert describe_card(card) == "Tesla V100-SXM2-16GB, 17 GB, driver 470.82.01"


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("true", "nvidia-smi prints nothing"),
        ("exit 9", "nvidia-smi says: exit code 9"),
        (
            "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18",
            "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch",
        ),
        ("echo 'Kein Ger\u00e4t gefunden' >&2; exit 6", "nvidia-smi says: Kein Ger\u00e4t gefunden"),
        ("printf '\\377\\376\\n\\033]0;x'; exit 1", "nvidia-smi says: \ufffd\ufffd ?]0;x"),
        ("echo 'No devices were found'; exit 6", "nvidia-smi says: No devices were found"),
        ("exec sleep 60", "nvidia-smi does not answer within 0 s"),
    ],
)
def test_no_card_has_a_reason(smi, script, fault, monkeypatch):
    if "sleep" in script:
        monkeypatch.setattr(nvidia, "TIMEOUT_SECONDS", 0.2)
    smi(script)
    report = nvidia_report()
    assert report.gpus == ()
    assert report.fault == fault
    (found,) = (f for f in diagnose(Machine((3, 12), nvidia_fault=fault)) if f.subject == "NVIDIA GPU")
    assert (found.level, found.text) == ("problem", fault)


def test_a_program_that_cannot_start(smi, tmp_path):
    smi("true")
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF not really")
    assert nvidia_report().fault.startswith("nvidia-smi does not start: ")


def test_no_driver_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_report() == nvidia.NvidiaReport()


def test_a_card_that_a_setting_hides_is_a_note_that_names_it():
    card = NvidiaGpu("NVIDIA H100", "580.1", "9.0", GB80)
    for setting in ("JAX_PLATFORMS=cpu", "CUDA_VISIBLE_DEVICES=''"):
        machine = Machine((3, 12), nvidia_gpus=(card,), hidden_cards=setting, memory=Headroom(1))
        (found,) = (f for f in diagnose(machine) if f.subject == "NVIDIA GPU")
        assert found.level == "note"
        assert f"{setting} hides it" in found.text
        assert found.advice == f"unset {setting.split('=')[0]} to use it"

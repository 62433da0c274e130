"""Instruction sets that the C code is written for, best first, and which of them this processor has."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "QWEN3_MOE_NATIVE"
"""Environment variable: the name of a form to take in place of the best one; or "off": no native kernels
but where they are asked for by name."""


@dataclass(frozen=True)
class Form:
    """One way to compute.

    Attributes:
      name: for people and for ``QWEN3_MOE_NATIVE``.
      machine: of ``platform.machine()``.
      needs: what the kernel's list of the processor's features has to name.
      macro: what the C code is compiled with.
      flags: what gcc and clang may use.
      zig_flags: the same for zig, which has names of its own for processors.
    """

    name: str
    machine: str
    needs: frozenset[str]
    macro: str
    flags: tuple[str, ...]
    zig_flags: tuple[str, ...]


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni"}

FORMS = (
    Form(
        "avx512",
        "x86_64",
        _AVX512,
        "FORM_AVX512",
        ("-march=x86-64-v4", "-mavx512vnni"),
        ("-march=x86_64_v4", "-mavx512vnni"),
    ),
    Form(
        "avxvnni",
        "x86_64",
        _AVX2 | {"avx_vnni"},
        "FORM_AVXVNNI",
        ("-march=x86-64-v3", "-mavxvnni"),
        ("-march=x86_64_v3", "-mavxvnni"),
    ),
    Form("avx2", "x86_64", _AVX2, "FORM_AVX2", ("-march=x86-64-v3",), ("-march=x86_64_v3",)),
    Form(
        "neon",
        "aarch64",
        frozenset({"asimd", "asimddp"}),
        "FORM_NEON",
        ("-march=armv8.2-a+dotprod",),
        ("-mcpu=generic+v8_2a+dotprod",),
    ),
)


def features() -> frozenset[str]:
    """What the kernel says of this machine's processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = [line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(found[0]) if found else frozenset()


def is_off() -> bool:
    """Whether ``QWEN3_MOE_NATIVE`` leaves these kernels to those who ask for them by name."""
    return os.environ.get(VARIABLE, "").lower() == "off"


def choose_form() -> Form:
    """The form that ``QWEN3_MOE_NATIVE`` names, or the best that this processor has.

    Raises:
      NotImplementedError: there is none; says why.
    """
    wanted = "" if is_off() else os.environ.get(VARIABLE, "").lower()
    if platform.system() != "Linux":
        raise NotImplementedError(f"its threads need Linux, and this is {platform.system()}")
    names = ", ".join(form.name for form in FORMS)
    if wanted and wanted not in {form.name for form in FORMS}:
        raise NotImplementedError(f"{VARIABLE}={wanted}: there is {names}")
    here, has = platform.machine(), features()
    for form in FORMS:
        if form.machine == here and form.needs <= has and wanted in ("", form.name):
            return form
    raise NotImplementedError(f"this processor ({here}) has none of {wanted or names}")

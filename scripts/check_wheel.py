"""Builds the source archive and the wheel, and checks what a user who installs them gets.

    python -m scripts.check_wheel [--keep FOLDER]
    python -m scripts.check_wheel --clean 3.11 3.12 3.13 3.14 [--receipt FILE]

Checked: the metadata (twine); the licenses; ``convert`` and ``kernels_pallas`` as folders of real files, in
the wheel and in the archive (in the clone they are links); neither tests nor scripts; that the installed
command and a user's script write text from another folder, beside a user's own ``convert.py``. The build
fetches setuptools; nothing else needs a network: dependencies are those of this environment.

With ``--clean`` the wheel is also installed with all that it needs into a fresh environment of each of these
Pythons, where ``pip check`` and the same uses must pass; a Python that this machine lacks is said. The
receipt has what was installed, the size and the time.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from qwen3_moe_jax.machine.child_environment import child_environment
from scripts import ROOT, leave

OF_TESTS = "qwen3_moe_jax/testing/"
"""What only tests and scripts of a clone use does not ship."""
FOLDERS = ("convert", "kernels_pallas")
OURS = {"qwen3_moe_jax"}
USER_SCRIPT = "use.py"


def build(out: Path) -> tuple[Path, Path]:
    """Builds from a copy, so that no build folder is left in the clone; returns (wheel, archive)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        skipped = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
        _run(sys.executable, "-m", "build", "--outdir", out, copy)
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, archive


def faults_of_wheel(wheel: Path) -> Iterator[str]:
    """What is wrong with the wheel's content."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    top = {name.split("/")[0] for name in names}
    if others := {name for name in top - OURS if not name.endswith(".dist-info")}:
        yield f"the wheel holds {sorted(others)}"
    yield from (f"the wheel holds {name}" for name in sorted(names) if name.startswith(OF_TESTS))
    yield from (f"the wheel lacks {name}" for name in sorted(files_of_the_clone() - names))
    for license_file in ("LICENSE", "NOTICE"):
        if not any(name.endswith(f".dist-info/licenses/{license_file}") for name in names):
            yield f"the wheel lacks {license_file}"


def files_of_the_clone() -> set[str]:
    """Every file that the package has here but for ``OF_TESTS``, by its name in a wheel."""
    files = {
        path.relative_to(ROOT) for folder in OURS for path in (ROOT / folder).rglob("*") if path.is_file()
    }
    files |= {
        Path("qwen3_moe_jax") / path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    names = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    return {name for name in names if not name.startswith(OF_TESTS)}


def faults_of_archive(archive: Path) -> Iterator[str]:
    """What is wrong with the source archive's content."""
    with tarfile.open(archive) as file:
        members = {member.name.split("/", 1)[-1]: member for member in file.getmembers()}
    for folder in FOLDERS:
        member = members.get(f"qwen3_moe_jax/{folder}/__init__.py")
        if member is None or not member.isfile():
            yield f"the archive lacks qwen3_moe_jax/{folder} as a folder of files"
    yield from (f"the archive holds a link: {name}" for name, m in members.items() if m.issym() or m.islnk())


def faults_of_installed(wheel: Path, folder: Path) -> Iterator[str]:
    """What is wrong with the installed package, used from a folder with modules of the same names."""
    site = folder / "site"
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    environment = child_environment(PYTHONPATH=str(site))
    yield from faults_of_use(site / "bin" / "qwen3-moe", Path(sys.executable), folder / "user", environment)


def faults_of_use(command: Path, python: Path, elsewhere: Path, environment: dict[str, str]) -> Iterator[str]:
    """What is wrong with the command and a user's script, run beside modules that have our names."""
    write_user_folder(elsewhere)
    generate = [str(command), "generate", "-q", "--backend", "reference", "-n", "4", "def f("]
    for what in (generate, [str(python), USER_SCRIPT], [str(command), "--version"]):
        done = subprocess.run(
            what, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode or not done.stdout.strip():
            yield f"{' '.join(what)} ends with {done.returncode}: {done.stderr.strip()}"


def python_of(version: str) -> str | None:
    """An interpreter of this version on the path or among pyenv's; None if there is none."""
    if found := shutil.which(f"python{version}"):
        done = subprocess.run([found, "-c", ""], capture_output=True, check=False)
        if not done.returncode:  # a shim may stand for a version that is not chosen
            return found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = sorted((root / "versions").glob(f"{version}.*/bin/python"))
    return str(places[-1]) if places else None


def clean_install(wheel: Path, version: str, folder: Path) -> dict[str, Any]:
    """Installs into a fresh environment and uses it; what came of it, ready for JSON."""
    python = python_of(version)
    if python is None:
        return {"python": version, "outcome": "not on this machine"}
    began = time.perf_counter()
    place = folder / f"clean-{version}"
    _run(python, "-m", "venv", place)
    inside = place / "bin" / "python"
    _run(inside, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel)
    seconds = time.perf_counter() - began
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    checked = subprocess.run([inside, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    faults = [checked.stdout.strip()] if checked.returncode else []
    faults += faults_of_use(place / "bin" / "qwen3-moe", inside, folder / f"user-{version}", environment)
    listed = subprocess.run(
        [inside, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    found = {
        "python": _version_of(inside),
        "outcome": "; ".join(faults) or "as it should be",
        "is_sound": not faults,
        "install_s": round(seconds, 1),
        "megabytes": round(sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) / 1e6),
        "packages": {p["name"]: p["version"] for p in json.loads(listed.stdout)},
    }
    shutil.rmtree(place)
    return found


def _version_of(python: Path) -> str:
    done = subprocess.run([python, "-V"], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def receipt_of(wheel: Path, versions: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``--clean`` with these versions found."""
    return {
        "what": "the wheel in clean environments",
        "command": f"python -m scripts.check_wheel --clean {' '.join(versions)}",
        "commit": commit(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "wheel": wheel.name,
        "megabytes": round(wheel.stat().st_size / 1e6, 1),
        "environments": rows,
    }


def commit() -> str:
    """The clone's commit, with a plus where files differ from it; nothing outside a clone."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude", "*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def write_user_folder(folder: Path) -> None:
    """A user's folder: a script that loads a model, beside modules that have the names of our folders."""
    folder.mkdir()
    for name in FOLDERS:
        (folder / f"{name}.py").write_text("raise RuntimeError('the module of the user')\n")
    (folder / USER_SCRIPT).write_text(
        "import qwen3_moe_jax as q3\n"
        "model = q3.load(backend='reference', max_context=64, gate=False)\n"
        "print(model.generate('def f(', max_tokens=2))\n"
    )


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder for the wheel and the archive")
    parser.add_argument(
        "--clean", nargs="*", default=[], metavar="VERSION", help="also in fresh environments"
    )
    parser.add_argument("--receipt", type=Path, help="write what --clean found here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, archive = build(args.keep or folder / "dist")
        _run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive)
        faults = [
            *faults_of_wheel(wheel),
            *faults_of_archive(archive),
            *faults_of_installed(wheel, folder),
        ]
        rows = [clean_install(wheel, version, folder) for version in args.clean]
        found = receipt_of(wheel, args.clean, rows)
    faults += [f"Python {row['python']}: {row['outcome']}" for row in rows if not row.get("is_sound", True)]
    print("\n".join(faults) or f"{wheel.name} and {archive.name}: as they should be")
    if rows:
        leave(found, args.receipt)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

"""Builds the source archive and the wheel, and checks what a user who installs them gets.

    python -m scripts.check_wheel [--keep FOLDER]

Checked: the metadata (twine); the licenses; ``convert`` and ``kernels_pallas`` as folders of real files, in
the wheel and in the archive (in the clone they are links); neither tests nor scripts; that the installed
command and a user's script write text from another folder, beside a user's own ``convert.py``. The build
fetches setuptools; nothing else needs a network: dependencies are those of this environment.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from scripts import ROOT, child_environment

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
    yield from (f"the wheel lacks {name}" for name in sorted(files_of_the_clone() - names))
    for license_file in ("LICENSE", "NOTICE"):
        if not any(name.endswith(f".dist-info/licenses/{license_file}") for name in names):
            yield f"the wheel lacks {license_file}"


def files_of_the_clone() -> set[str]:
    """Every file that the package has here, by its name in a wheel."""
    files = {
        path.relative_to(ROOT) for folder in OURS for path in (ROOT / folder).rglob("*") if path.is_file()
    }
    files |= {
        Path("qwen3_moe_jax") / path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


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
    site, elsewhere = folder / "site", folder / "elsewhere"
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    write_user_folder(elsewhere)
    command = [
        str(site / "bin" / "qwen3-moe"),
        "generate",
        "-q",
        "--backend",
        "reference",
        "-n",
        "4",
        "def f(",
    ]
    for what in (command, [sys.executable, USER_SCRIPT]):
        environment = child_environment(PYTHONPATH=str(site))
        done = subprocess.run(
            what, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode or not done.stdout.strip():
            yield f"{' '.join(what)} ends with {done.returncode}: {done.stderr.strip()}"


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
    print("\n".join(faults) or f"{wheel.name} and {archive.name}: as they should be")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())

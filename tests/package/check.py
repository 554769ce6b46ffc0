"""Builds the wheel and the source archive, looks into them, and uses the wheel in an environment without the checkout.

``python tests/package/check.py`` needs `build` and `hatchling`, which are among the development tools. The environment
is new and has the wheel alone; for what the wheel depends on it looks into the packages of the Python that runs this.
"""

import argparse
import email.parser
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[2]
USE = Path(__file__).with_name("use.py")
JUNK = ("__pycache__", ".pyc", ".so", ".egg-info", ".ipynb_checkpoints", ".DS_Store", "runs/", ".venv")
IN_ARCHIVE = (
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md"),
    *("constraints.txt", "mkdocs.yml", "pyproject.toml"),
    *("docs/index.md", "examples/README.md", "tests/conftest.py", "benchmarks/run.py", "src/ibaml/py.typed"),
)


def build(folder: Path) -> tuple[Path, Path]:
    """Returns the wheel, which is built from the source archive, and that archive."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{built.stdout}")
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


def check_metadata(text: str) -> Metadata:
    """Returns the metadata, which are those that an index accepts."""
    found = Metadata.from_email(text, validate=True)
    assert found.license_expression == "Apache-2.0" and found.license_files == ["LICENSE"], found
    assert found.description_content_type == "text/markdown" and (found.description or "").startswith("# ibaml")
    for line in email.parser.Parser().parsestr(text).get_all("Requires-Dist", []):
        assert ">=" in line or line.startswith("ibaml["), f"{line} has no lower bound"
    return found


def check_contents(wheel: Path, archive: Path) -> str:
    """Checks what is in both files and returns the version."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (information,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = check_metadata(file.read(f"{information}/METADATA").decode())
        assert f"{information}/licenses/LICENSE" in names and "ibaml/py.typed" in names
        assert {name.split("/")[0] for name in names} == {"ibaml", information}, "only the package belongs in the wheel"
    with tarfile.open(archive) as file:
        packed = [name.split("/", 1)[1] for name in file.getnames() if "/" in name]
    assert (missing := set(IN_ARCHIVE) - set(packed)) == set(), f"the source archive lacks {missing}"
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/ibaml").rglob("*.py")}
    assert modules <= set(names) and {f"src/{name}" for name in modules} <= set(packed)
    assert [name for name in (*names, *packed) for junk in JUNK if junk in name] == []
    assert wheel.stat().st_size < 2**22 and archive.stat().st_size < 2**24, "larger than it ever was: look what for"
    return str(metadata.version)


def install(wheel: Path, folder: Path) -> Path:
    """Returns the Python of a new environment that has the wheel, and the dependencies of the running Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    # A plain path: the .pth files in there, and with them an editable installation of the checkout, are not read.
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def main() -> None:
    """Builds, checks and uses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that keeps the wheel and the archive")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, archive = build(folder / "dist")
        version = check_contents(wheel, archive)
        python = install(wheel, folder / "environment")
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        # -I: neither PYTHONPATH nor the folder of the script may lend a module.
        subprocess.run([str(python), "-I", str(USE), version, str(python.parent)], cwd=elsewhere, check=True)
        if wanted.out is not None:
            shutil.copytree(folder / "dist", wanted.out, dirs_exist_ok=True)
    print(f"{wheel.name} and {archive.name} are complete, and the wheel works without the checkout")


if __name__ == "__main__":
    main()

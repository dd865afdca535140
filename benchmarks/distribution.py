"""Build sdist and wheel as a release would, install each in a clean environment, and use it.

    python benchmarks/distribution.py                        # into dist/; the kernels take minutes
    python benchmarks/distribution.py --pythons python3.11 python3.12 python3.13 --with-dependencies
    CXX=/no/compiler python benchmarks/distribution.py       # without kernels, in a minute

The sdist is made from this source tree, the wheel from the sdist, so that a file which the sdist lacks is noticed. A wheel made by
Python 3.12 or newer is for all that come after; 3.11 has its own. Each Python installs the wheel that fits it. Without
`--with-dependencies` torch and the others are borrowed from the environment that runs this, which only its own
version of Python can do. The exit code is 1 where a layer is wrong or a file is missing.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from benchmarks.installation import FIRST_USE, SOURCE, TOLERANCE, borrow

NEEDED = "LICENSE", "README.md", "CMakeLists.txt", "pyproject.toml", "csrc/product.h", "src/throughtime/app/page"
UNWANTED = ".git/", ".venv/", "build/", ".so", "__pycache__"


def call(*command: object, folder: Path | None = None) -> str:
    """Run a command, and end with what it said where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(python: str, folder: Path) -> Path:
    """Make a virtual environment with pip in it; return its Python."""
    call(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def build(python: str, out: Path, work: Path) -> tuple[Path, Path]:
    """Build an sdist, and a wheel from it."""
    builder = environment(python, work / "builder")
    call(builder, "-m", "pip", "install", "--quiet", "build")
    call(builder, "-m", "build", "--sdist", "--outdir", out, SOURCE)
    sdist = max(out.glob("throughtime-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    call(builder, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, sdist)
    return sdist, max(out.glob("throughtime-*.whl"), key=lambda path: path.stat().st_mtime)


def contents_fault(sdist: Path, wheel: Path) -> str | None:
    """Return what is wrong with what the archives hold."""
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for needed in NEEDED:
        if not any(name.startswith(needed) for name in names):
            return f"the sdist has no {needed}"
    for unwanted in UNWANTED:
        if found := [name for name in names if unwanted in name]:
            return f"the sdist has {found[0]}"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    if not any(name.startswith("throughtime/app/page/") for name in names):
        return "the wheel has no pages"
    return None if any(name.endswith("licenses/LICENSE") for name in names) else "the wheel has no licence"


def use(python: str, wheel: Path, work: Path, with_dependencies: bool) -> str:
    """Install a wheel for a Python and compare its layers with torch.nn's; return what came."""
    own = environment(python, work / f"{Path(python).name}-{wheel.stem}")
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    call(*install, *([] if with_dependencies else ["--no-deps"]), wheel)
    if not with_dependencies:
        borrow(own)
    told = json.loads(call(own, "-c", FIRST_USE.format(prefix=str(own.parent.parent)), folder=work))
    if not told["error"] <= TOLERANCE:
        raise SystemExit(f"{wheel.name} on {python}: layers differ from torch.nn's by {told['error']:.1e}")
    version = call(own.parent / "throughtime", "--version", folder=work).strip()
    kernels = ", ".join(told["sets"]) or "none"
    return f"{version}; kernels: {kernels}; layers differ from torch.nn's by {told['error']:.1e} at most"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=SOURCE / "dist", help="where sdist and wheels go")
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], metavar="PYTHON")
    parser.add_argument("--with-dependencies", action="store_true", help="install torch and the others, gigabytes")
    chosen = parser.parse_args(arguments)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wheel = None
    for python in chosen.pythons:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder).resolve()
            if wheel is None or "abi3" not in wheel.name:  # an abi3 wheel fits whatever comes after
                sdist, wheel = build(python, out, work)
                print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.1f} MB", flush=True)
                print(f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
                if fault := contents_fault(sdist, wheel):
                    print(f"  {fault}")
                    return 1
            print(f"  {Path(python).name}: {use(python, wheel, work, chosen.with_dependencies)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

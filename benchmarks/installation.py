"""What an installation with this or that compiler builds, says and computes; with none, too.

    python benchmarks/installation.py                       # no compiler, GCC 9 and 12, clang: those that are found
    python benchmarks/installation.py --compilers none g++-9 --tests
    python benchmarks/installation.py --build-folder build/compilers  # keeps what is compiled for the next time

Each compiler gets a virtual environment of its own, into which pip builds and installs this source tree. To keep that light it
borrows torch and the other dependencies from the environment that runs this; only throughtime and what builds it are fetched
and made anew. "none" is an installation with CXX naming a program that doesn't exist. Where a layer is wrong, or a
compiler that is there builds no kernels, the exit code is 1.
"""

import argparse
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
COMPILERS = "none", "g++-9", "g++-12", "clang++"
TOLERANCE = 1e-5  # of outputs and gradients of order 1 in float32

# Run by the new environment: three layers against torch.nn, forward and backward; a JSON object tells what came.
FIRST_USE = """
import json, torch, throughtime
from throughtime.kernels import native
assert throughtime.__file__.startswith({prefix!r}), throughtime.__file__
errors = []
for name in ("RNN", "LSTM", "GRU"):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(20, 70, num_layers=2, bidirectional=True)
    ours = getattr(throughtime, name)(20, 70, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(30, 9, 20)
    results = []
    for layer in (ours, theirs):
        output = layer(x)[0]
        results.append([output, *torch.autograd.grad(output.square().mean(), list(layer.parameters()))])
    errors += [(a - b).abs().max().item() for a, b in zip(*results)]
sets = [] if native.missing else native.instruction_sets()
file = None if native.missing else native.module.__file__
print(json.dumps(dict(error=max(errors), sets=sets, backend=throughtime.backends().get("native"), file=file)))
"""


@dataclass
class Found:
    """What one installation is like."""

    compiler: str
    version: str
    built: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    pip: str = ""  # what pip printed
    runs: list[str] = field(default_factory=list)  # instruction sets that this machine can run of those built
    native: str | None = None  # as `backends()` describes the kernels
    first_use: str = ""  # on stderr
    train: str = ""  # on stderr, of the lines those that aren't about the training
    error: float = float("nan")  # largest difference to torch.nn
    tests: dict[str, str] = field(default_factory=dict)  # last line of the kernels' tests by instruction set

    @property
    def is_right(self) -> bool:
        """Whether layers compute right and kernels are there where they should be."""
        passed = all("failed" not in line and "error" not in line for line in self.tests.values())
        return self.error <= TOLERANCE and passed and bool(self.runs) == (self.compiler != "none")


def run(command: list[str], **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command with settings in its environment."""
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)


def install(compiler: str, program: str, folder: Path, build: Path) -> tuple[Path, str]:
    """Install into a new environment; return its Python and what pip printed."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--no-cache-dir", "--no-deps", "--disable-pip-version-check"]
    ended = run([*pip, f"--config-settings=build-dir={build}", str(SOURCE)], CXX=program)
    if ended.returncode:
        raise SystemExit(f"{compiler}: pip failed with {ended.returncode}\n{ended.stdout}{ended.stderr}")
    borrow(python)
    return python, (ended.stdout + ended.stderr).strip()


def borrow(python: Path) -> None:
    """Let an environment see, after its own packages, those of the one that runs this."""
    own = next((python.parent.parent / "lib").glob("python*/site-packages"))
    borrowed = [path for path in sys.path if path and Path(path).name == "site-packages"] or site.getsitepackages()
    (own / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")


def instruction_sets(build: Path) -> tuple[list[str], list[str]]:
    """Return the instruction sets that a build folder has kernels for, and those that were left out."""
    cache = build / "CMakeCache.txt"
    asked = dict(re.findall(r"^knows_(\w+):\w+=(\w+)$", cache.read_text(encoding="utf-8"), re.MULTILINE))
    built = ["generic", *(name for name, knows in asked.items() if knows == "TRUE")]
    return built, [name for name in asked if name not in built]


def examine(compiler: str, folder: Path, build: Path, with_tests: bool) -> Found:
    """Install with a compiler, use what came, and tell."""
    program = "/no/compiler" if compiler == "none" else str(shutil.which(compiler))
    version = "" if compiler == "none" else run([program, "--version"]).stdout.splitlines()[0]
    found = Found(compiler, version)
    python, found.pip = install(compiler, program, folder, build)
    used = run([str(python), "-c", FIRST_USE.format(prefix=str(folder))])
    if used.returncode:
        raise SystemExit(f"{compiler}: the first use failed\n{used.stderr}")
    told = json.loads(used.stdout)
    found.error, found.runs, found.native, found.first_use = (
        *(told["error"], told["sets"], told["backend"]),
        used.stderr.strip(),
    )
    if found.runs:
        found.built, found.left_out = instruction_sets(build)
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    small = ["--steps", "2", "--hidden", "8", "--batch", "2", "--bptt", "16"]
    trained = run([str(folder / "bin" / "throughtime"), "train", str(text), "--out", str(folder / "run"), *small])
    found.train = "\n".join(line for line in trained.stderr.splitlines() if line.startswith("throughtime"))
    if trained.returncode:
        raise SystemExit(f"{compiler}: training failed\n{trained.stderr}")
    for name in found.runs if with_tests else []:
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SOURCE / "tests" / "kernels")]
        settings = {"THROUGHTIME_NATIVE": told["file"], "THROUGHTIME_INSTRUCTION_SET": name, "OMP_NUM_THREADS": "1"}
        found.tests[name] = run(tests, **settings).stdout.strip().splitlines()[-1]
    return found


def report(found: Found) -> str:
    """Return what was found, a line for each thing."""
    lines = {
        "built": ", ".join(found.built) or "no kernels",
        "left out": ", ".join(found.left_out),
        "this CPU runs": ", ".join(found.runs),
        "backends()": found.native or "no native",
        "pip": found.pip.splitlines()[-1] if found.pip else "",
        "first use": found.first_use or "nothing",
        "train": found.train or "nothing",
        "against torch.nn": f"differs by {found.error:.1e} at most",
        **{f"tests, {name}": line for name, line in found.tests.items()},
        "verdict": "right" if found.is_right else "WRONG",
    }
    shown = "\n".join(f"  {name:17}{line}" for name, line in lines.items() if line)
    return f"{found.compiler}  {found.version}\n{shown}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--compilers", nargs="+", default=COMPILERS, metavar="NAME", help="programs on the PATH, or none"
    )
    parser.add_argument("--tests", action="store_true", help="run the kernels' tests with each instruction set")
    parser.add_argument("--build-folder", type=Path, help="keep what is compiled here, a folder for each compiler")
    chosen = parser.parse_args(arguments)
    all_right = True
    for compiler in chosen.compilers:
        if compiler != "none" and shutil.which(compiler) is None:
            print(f"{compiler}  not at hand", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            build = (chosen.build_folder or Path(folder) / "build").resolve() / compiler
            found = examine(compiler, Path(folder).resolve() / "environment", build, chosen.tests)
        print(report(found), flush=True)
        all_right &= found.is_right
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run the tests that compute as they would run on other CPUs than this one: one line for each, exit code 1 if any fails.

    python tests/every_cpu.py                 # all: about an hour on two cores; `make test-cpus` does this
    python tests/every_cpu.py avx2/avx2       # our instruction set / torch's
    python tests/every_cpu.py one-thread no-kernels

Another CPU is stood in for by the instructions that the kernels (`THROUGHTIME_INSTRUCTION_SET`) and torch (`ATEN_CPU_CAPABILITY`)
may use; where AVX512-BF16 is none of ours, oneDNN is told too. What MKL does can't be chosen, nor what this machine lacks.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from throughtime.kernels import native

ROOT = Path(__file__).parent.parent
_ALL_OF_TORCH = ["default", "avx2", "avx512"]
OF_TORCH = _ALL_OF_TORCH[
    : _ALL_OF_TORCH.index(torch.backends.cpu.get_cpu_capability().lower()) + 1
]  # torch asks no CPU
NO_ARITHMETIC = (
    "tests/app",
    *(
        f"tests/lm/test_{name}.py"
        for name in ("corpus", "tokenizer", "words", "bpe", "formats", "hostile_text", "baseline")
    ),
    *(f"tests/training/test_{name}.py" for name in ("crashes", "checkpoint", "files", "schedule")),
)


def configurations() -> dict[str, dict[str, str]]:
    """Return the environment of each, by name."""
    ours = [] if native.missing else native.instruction_sets()
    found = {}
    for own, torchs in product(ours, OF_TORCH):
        settings = {"THROUGHTIME_INSTRUCTION_SET": own, "ATEN_CPU_CAPABILITY": torchs}
        if own != "avx512_bf16":
            settings["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"
        found[f"{own}/{torchs}"] = settings
    return found | {"one-thread": {"OMP_NUM_THREADS": "1"}, "no-kernels": {"THROUGHTIME_NATIVE": "none"}}


def run(settings: dict[str, str], options: Sequence[str]) -> tuple[int, str]:
    """Run the tests; return pytest's exit code and what it printed."""
    left_out = [f"--ignore={path}" for path in NO_ARITHMETIC]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *left_out, *options, "tests"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def main() -> int:
    """Run them one after the other."""
    known = configurations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(known)}; all if none is named")
    parser.add_argument("--pytest", default="--numprocesses auto --dist worksteal", help="options of pytest")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"{', '.join(unknown)}: expected {', '.join(known)}")
    failed = 0
    for name in given.names or known:
        began = time.perf_counter()
        code, printed = run(known[name], given.pytest.split())
        failed += code != 0
        closing = re.findall(r"=* ?(\d+ (?:passed|failed|skipped|error).*?)(?: in .*)?$", printed, re.M)
        print(f"{name:20} {(closing or [f'exit code {code}'])[-1]}, {time.perf_counter() - began:.0f} s", flush=True)
        if code:
            print(*re.findall(r"^(?:FAILED|ERROR) .*", printed, re.M) or [printed[-3000:]], sep="\n", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

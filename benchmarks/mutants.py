"""Wrong Triton kernels, made one small change at a time: does a test of theirs fail?

    python -m benchmarks.mutants [--count 40] [--seed 0] [--file forward.py backward.py]
    python -m benchmarks.mutants --again bench-results/mutants-….json --whole     # those that survived there

A mutant is a copy of the sources with one change in `src/throughtime/kernels/triton`: another operator, comparison or constant,
a load or store without its mask, branches exchanged, a condition negated, a statement left out. Tests of
`tests/kernels/test_triton.py`, or with `--whole` all of them, run in the copy, in Triton's interpreter, up to the first failure; a
test that takes longer than `--limit` counts as failed. The
tree as it is must pass first. Kinds of changes take turns, and a seed draws the same ones as long as the sources are the same. A
survivor is a gap in the tests, a change that changes no result, or one that only a GPU shows: that is for a reader to decide. No
GPU is needed. All of it goes to bench-results/ as JSON.
"""

import argparse
import ast
import json
import multiprocessing
import os
import queue
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1]
KERNELS = Path("src/throughtime/kernels/triton")
FILES = ("forward.py", "backward.py", "exchange.py", "arithmetic.py", "plan.py")
ALL = "tests/kernels/test_triton.py"
TESTS = tuple(
    f"{ALL}::test_{name}"
    for name in (
        "every_cell",
        "lengths_and_resets_backwards_over_several_programs",
        "one_unit",
        "token_ids_of_any_vocabulary",
        "packed_rows_in_reverse",
        "both_directions_at_once[{'packed': True}-lstm+coupled+layer_norm+peepholes]",
        "both_directions_at_once[{'ragged': True, 'resets': True}-gru_reset_before]",
        "two_bytes_a_number",
        "an_expectation_stands_for_masks",
        "more_rows_than_run_at_once",
        "a_layer_as_deep_as_many_chunks",
        "numbers_that_are_exchanged_two_to_a_word_in_many_chunks",
        "a_state_that_looks_unset_is_not_waited_for",
        "padding_may_hold_anything",
        "nothing_is_kept_where_no_backward_pass_follows",
        "gradients_that_are_not_there_are_zero",
        "a_batch_of_no_rows",
    )
)  # those that find most, first; a survivor is tried again with all
HANG = 900.0  # seconds for all tests of a mutant

# What tests import that isn't ours, and takes seconds: imported once, by the process that each mutant's is forked from.
PRELOADED = ["torch", "triton.language", "triton.runtime.interpreter", "pytest", "hypothesis", "jaxtyping", "beartype"]

ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
COMPARISONS = {
    ast.Lt: (r"<", "<="),
    ast.LtE: (r"<=", "<"),
    ast.Gt: (r">", ">="),
    ast.GtE: (r">=", ">"),
    ast.Eq: (r"==", "!="),
    ast.NotEq: (r"!=", "=="),
    ast.Is: (r"\bis\b", "is not"),
    ast.IsNot: (r"\bis\s+not\b", "is"),
    ast.In: (r"\bin\b", "not in"),
    ast.NotIn: (r"\bnot\s+in\b", "in"),
}


class Mutation(NamedTuple):
    """One change of a file."""

    file: str
    line: int
    start: int  # in the file, in bytes
    before: str
    after: str
    kind: str

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.file}:{self.line}  {before}  ->  {after}"


class Outcome(NamedTuple):
    """What came of a mutant."""

    mutation: Mutation
    caught_by: str | None  # a test, or "" before the first; None where it survived
    is_ended: bool
    seconds: float


class Text:
    """A source file with positions as `ast` counts them, in bytes."""

    def __init__(self, source: str) -> None:
        self.bytes = source.encode()
        self.lines = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return where a node begins and ends."""
        begin = self.lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        return begin, self.lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        """Return a node's text."""
        begin, end = self.span(node)
        return self.bytes[begin:end].decode()

    def between(self, left: ast.AST, right: ast.AST, pattern: str) -> tuple[int, int]:
        """Return where an operator stands between its operands."""
        begin, end = self.span(left)[1], self.span(right)[0]
        found = re.search(pattern.encode(), self.bytes[begin:end])
        assert found is not None
        return begin + found.start(), begin + found.end()


Change = tuple[int, int, str]  # what is written from here to there


def arithmetic(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield other operators."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        own, other = ARITHMETIC[type(node.op)]
        yield *text.between(node.left, node.right, re.escape(own)), other
    if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        own, other = ARITHMETIC[type(node.op)]
        yield *text.between(node.target, node.value, re.escape(own + "=")), other + "="


def comparison(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield comparisons that differ in the equal."""
    if isinstance(node, ast.Compare):
        for left, sign, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            own, other = COMPARISONS[type(sign)]
            yield *text.between(left, right, own), other


def constant(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield the numbers beside a number."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        for other in (node.value + 1, node.value - 1):
            yield *text.span(node), repr(other) if other >= 0 else f"({other!r})"


def one(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield sums and differences without their 1."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        for which, other in ((node.left, node.right), (node.right, node.left)):
            if isinstance(which, ast.Constant) and which.value == 1:
                yield *text.span(node), text.of(other)


def access(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield loads and stores without their mask, without what stands for what is masked, and loads that are no longer volatile."""
    if not (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "store")
    ):
        return
    arguments: list[ast.AST] = [*node.args, *node.keywords]
    there = {keyword.arg for keyword in node.keywords}
    for dropped in ({"mask", "other"}, {"other"}, {"volatile"}):
        if dropped & there:
            left = [a for a in arguments if getattr(a, "arg", None) not in dropped]
            yield text.span(arguments[0])[0], text.span(arguments[-1])[1], ", ".join(map(text.of, left))


def where(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield choices with their branches exchanged."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "where":
        _, yes, no = node.args
        yield text.span(yes)[0], text.span(no)[1], f"{text.of(no)}, {text.of(yes)}"


def logic(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield `and` for `or`, and the reverse, and what `not` negates."""
    if isinstance(node, ast.BoolOp):
        own, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield *text.between(left, right, rf"\b{own}\b"), other
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
        yield *text.span(node), text.of(node.operand)


def condition(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield negated conditions."""
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield *text.span(node.test), f"not ({text.of(node.test)})"


def statement(node: ast.AST, text: Text) -> Iterator[Change]:
    """Yield functions without a call, or without an assignment to what has been assigned before."""
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield *text.span(node), "pass"
    if isinstance(node, ast.FunctionDef):
        known = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}
        for own in _in_order(node):
            names = {n.id for target in own.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            if names <= known:
                yield *text.span(own), "pass"
            known |= names


def _in_order(function: ast.FunctionDef) -> list[ast.Assign]:
    found = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    return sorted(found, key=lambda node: node.lineno)


KINDS: tuple[Callable[[ast.AST, Text], Iterator[Change]], ...] = (
    arithmetic,
    comparison,
    constant,
    one,
    access,
    where,
    logic,
    condition,
    statement,
)


def mutations(file: str, source: str) -> list[Mutation]:
    """Return all changes that are made of a file; types and decorators stay as they are."""
    text, found = Text(source), set()
    for node in _computed(ast.parse(source)):
        for kind in KINDS:
            for start, end, after in kind(node, text):
                line = text.bytes[:start].count(b"\n") + 1
                before = text.bytes[start:end].decode()
                found.add(Mutation(file, line, start, before, after, kind.__name__))
    return sorted(found)


def _computed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a node and those below it that are computed with."""
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list") and not isinstance(value, ast.JoinedStr):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.Assert):
                    yield from _computed(child)


def draw(found: Sequence[Mutation], count: int, seed: int) -> list[Mutation]:
    """Draw changes, of each kind in turn."""
    chance = random.Random(seed)
    kinds = [[m for m in found if m.kind == kind.__name__] for kind in KINDS]
    for own in kinds:
        chance.shuffle(own)
    drawn: list[Mutation] = []
    while len(drawn) < count and any(kinds):
        drawn += [own.pop() for own in kinds if own]
    return drawn[:count]


def mutated(source: str, mutation: Mutation) -> str:
    """Return a file's text with a change."""
    text, before = source.encode(), mutation.before.encode()
    end = mutation.start + len(before)
    if text[mutation.start : end] != before:
        raise SystemExit(f"{mutation.file}:{mutation.line} has changed since: there is no {mutation.before!r}")
    return (text[: mutation.start] + mutation.after.encode() + text[end:]).decode()


def copy_tree(to: Path) -> Path:
    """Copy what the tests need; bytecode there is of files as old as it says, so of none that is changed."""
    for name in ("src", "tests"):
        shutil.copytree(SOURCE / name, to / name, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(SOURCE / "pyproject.toml", to)
    return to


def run_tests(tree: Path, tests: Sequence[str], limit: float) -> tuple[str | None, bool]:
    """Run tests in a copy up to the first that fails; return its name, and whether it was ended: it hung, or crashed.

    The name is "" where no test began, and `None` where all passed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_inside, args=(tree, tests, limit))
    process.start()
    process.join(HANG)
    process.kill()
    process.join()
    said = (tree / "output.txt").read_text(encoding="utf-8", errors="replace")
    code = process.exitcode
    if code == 0:
        return None, False
    names = re.findall(r"^\S*\.py::(.*?)(?: (PASSED|FAILED|ERROR|SKIPPED).*)?$", said, re.MULTILINE)
    if code is None or code > 2 or (code == 1 and not names):  # below 0 is a signal's, 2 an error before the first test
        raise SystemExit(f"pytest ended with {code}: {said[-1000:]}")
    failed = [name for name, came in names if came in ("FAILED", "ERROR")]
    is_ended = not failed and code != 2
    begun = [name for name, _ in names] if is_ended else failed
    return (begun[-1].strip() if begun else ""), is_ended


def _inside(tree: Path, tests: Sequence[str], limit: float) -> None:
    """Run tests in this process."""
    output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(tree)
    os.environ["THROUGHTIME_NATIVE"] = "none"
    os.environ.pop("PYTEST_ADDOPTS", None)
    sys.dont_write_bytecode = True
    sys.meta_path.insert(0, PathFinder)  # an editable install's finder would be asked before it
    sys.path.insert(0, str(tree / "src"))
    found = find_spec("throughtime")
    if "throughtime" in sys.modules or found is None or not str(found.origin).startswith(str(tree)):
        print("another throughtime would be tested")
        sys.exit(3)
    import pytest

    options = ["-x", "-v", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]
    sys.exit(pytest.main([*options, f"--timeout={limit}", "--timeout-method=thread", *tests]))


def try_mutants(
    drawn: Sequence[Mutation], tests: Sequence[str], limit: float, workers: int, folder: Path
) -> Iterator[Outcome]:
    """Test mutants, `workers` at a time; yield what came of each as it comes."""
    trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for number in range(workers):
        trees.put(copy_tree(folder / str(number)))

    def attempt(mutation: Mutation) -> Outcome:
        tree = trees.get()
        path = tree / KERNELS / mutation.file
        source = path.read_text(encoding="utf-8")
        began = time.perf_counter()
        try:
            path.write_text(mutated(source, mutation), encoding="utf-8")
            caught_by, is_ended = run_tests(tree, tests, limit)
        finally:
            path.write_text(source, encoding="utf-8")
            trees.put(tree)
        return Outcome(mutation, caught_by, is_ended, time.perf_counter() - began)

    with ThreadPoolExecutor(workers) as pool:
        for each in as_completed([pool.submit(attempt, mutation) for mutation in drawn]):
            yield each.result()


def line_of(outcome: Outcome) -> str:
    """Return a line about a mutant."""
    if outcome.caught_by is None:
        came = "SURVIVED"
    elif outcome.is_ended:
        came = f"hangs or crashes in {outcome.caught_by or 'the tests'}"
    else:
        came = f"caught by {outcome.caught_by or 'the import'}"
    return f"{outcome.mutation}  {came}"


def survivors_of(path: Path) -> list[Mutation]:
    """Return those that survived an earlier run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["mutants"]
        return [Mutation(**each["mutation"]) for each in found if each["caught_by"] is None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--again: {path} isn't a file that this script wrote: {error}") from None


@contextmanager
def _interpreted() -> Iterator[None]:
    """Let what is preloaded be interpreted, and end the process that has it, so that no other gets it."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
        forkserver._forkserver._stop()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]  there is no other way


def main(arguments: list[str] | None = None) -> int:
    """Test mutants; the exit code says whether the tree as it is failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40, help="mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", nargs="+", choices=FILES, default=list(FILES), metavar="FILE", help=", ".join(FILES))
    parser.add_argument("--again", type=Path, metavar="JSON", help="only those that survived an earlier run")
    parser.add_argument("--whole", action="store_true", help="run all tests, which takes a survivor a minute")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="others, as pytest takes them")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a test")
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for the JSON file")
    given = parser.parse_args(arguments)
    tests = [ALL] if given.whole else given.tests
    if given.again:
        drawn = survivors_of(given.again)
    else:
        found = [m for f in given.file for m in mutations(f, (SOURCE / KERNELS / f).read_text(encoding="utf-8"))]
        drawn = draw(found, given.count, given.seed)
        print(f"{len(drawn)} of {len(found)} mutants, seed {given.seed}", flush=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder, _interpreted():
        failed, _ = run_tests(copy_tree(Path(folder).resolve() / "unchanged"), tests, given.limit)
        if failed is not None:
            print(f"the tree as it is fails: {failed or 'at the import'}")
            return 1
        for outcome in try_mutants(drawn, tests, given.limit, given.workers, Path(folder).resolve()):
            outcomes.append(outcome)
            print(line_of(outcome), flush=True)
    survived = [outcome.mutation for outcome in outcomes if outcome.caught_by is None]
    print(
        f"\n{len(outcomes)} mutants, {len(outcomes) - len(survived)} caught, {len(survived)} survived",
        *survived,
        sep="\n",
    )
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"mutants-{time.strftime('%Y%m%d-%H%M%S')}.json"
    listed = [outcome._asdict() | {"mutation": outcome.mutation._asdict()} for outcome in outcomes]
    path.write_text(json.dumps({"seed": given.seed, "mutants": listed}, indent=1), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

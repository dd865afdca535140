"""The benchmark: wrong answers are not timed, turns alternate, figures are what they are called, and every peer is right."""

import contextlib
import json
import os
import sys
import tarfile
import tomllib
import zipfile

import numpy as np
import pytest
import torch

import throughtime
from benchmarks import (
    clients,
    distribution,
    equal_budget,
    installation,
    mutants,
    options,
    pools,
    ranks,
    step,
    sweep,
    versions,
)
from benchmarks.speed import cases, character_model, layer_norm
from benchmarks.speed.case import HONEST, OURS, Contest, Contestant, Figure, times_faster, times_slower
from benchmarks.speed.problem import Problem
from benchmarks.speed.report import lines_of, table
from benchmarks.speed.timing import WrongAnswerError, check, take_turns
from throughtime.kernels import native

RIGHT = torch.linspace(-1, 1, 50, dtype=torch.float64)


def contest(ours: torch.Tensor, peer: torch.Tensor) -> Contest:
    return Contest(
        [Contestant(OURS, lambda: [ours], judged_by="torch.nn"), Contestant("torch.nn", lambda: [peer])],
        lambda: [RIGHT],
    )


def test_the_gate_lets_three_times_the_peers_error_pass_and_no_more():
    peer = (RIGHT + 1e-5).float()
    check(contest((RIGHT + 2.9e-5).float(), peer), [RIGHT])
    with pytest.raises(WrongAnswerError, match=r"throughtime: result 0 errs by 3\.1"):
        check(contest((RIGHT + 3.1e-5).float(), peer), [RIGHT])


@pytest.mark.parametrize("wrong", [RIGHT.float()[:-1], RIGHT.float() * torch.nan, RIGHT.float().flip(0)])
def test_the_gate_refuses_other_answers_of_ours_and_of_the_peer(wrong):
    with pytest.raises(WrongAnswerError, match="throughtime"):
        check(contest(wrong, RIGHT.float()), [RIGHT])
    with pytest.raises(WrongAnswerError, match=r"torch\.nn"):
        check(contest(RIGHT.float(), wrong), [RIGHT])


def contest_before_an_honest_judge(peer: torch.Tensor, honest: torch.Tensor) -> Contest:
    return Contest([Contestant("peer", lambda: [peer], judged_by=HONEST)], lambda: [RIGHT], honest=[lambda: [honest]])


def test_where_rounding_grows_a_peer_is_judged_by_the_equations_error():
    honest = (RIGHT + 1e-3).float()
    check(contest_before_an_honest_judge((RIGHT - 2.9e-3).float(), honest), [RIGHT])
    for wrong in ((RIGHT - 3.1e-3).float(), RIGHT.float().flip(0), RIGHT.float() * torch.nan):
        with pytest.raises(WrongAnswerError, match="peer: result 0"):
            check(contest_before_an_honest_judge(wrong, honest), [RIGHT])


def test_of_several_honest_answers_the_least_accurate_judges():
    answers = [lambda error=error: [(RIGHT + error).float()] for error in (1e-4, 1e-3, 2e-4)]
    for error, is_right in ((2.9e-3, True), (3.1e-3, False)):
        peer = Contestant("peer", lambda error=error: [(RIGHT - error).float()], judged_by=HONEST)
        with contextlib.nullcontext() if is_right else pytest.raises(WrongAnswerError, match="peer: result 0"):
            check(Contest([peer], lambda: [RIGHT], honest=answers), [RIGHT])


def test_equations_that_err_by_more_than_rounding_judge_nobody():
    with pytest.raises(WrongAnswerError, match=HONEST):
        check(contest_before_an_honest_judge(RIGHT.float(), (RIGHT + 2e-2).float()), [RIGHT])


@pytest.mark.parametrize("mutated", ["gain_c_l0", "shift_c_l0", "bias_hh_l0", "weight_hh_l0"])
def test_the_gate_of_layer_normalisation_catches_a_mutant(monkeypatch, mutated):
    """A hundred steps amplify rounding, but not up to a parameter with two units exchanged."""
    contest = cases._layer_norm_contest(100, 4, 16, cases.Choice(frozenset()))
    check(contest, contest.exact())
    original = layer_norm._layer

    def spoiled(problem: Problem) -> layer_norm.LayerNormLSTM:
        layer = original(problem)
        parameter = layer.get_parameter(mutated).data
        parameter[[0, 1]] = parameter[[1, 0]]
        return layer

    monkeypatch.setattr(layer_norm, "_layer", spoiled)
    wrong = Contestant("eager", layer_norm.by_torch(Problem("lstm", 100, 4, 16)), judged_by=HONEST)
    with pytest.raises(WrongAnswerError, match="eager: result 0"):
        check(Contest([wrong], contest.exact, honest=contest.honest), contest.exact())


def test_the_character_models_exact_answer_is_that_of_its_first_step(monkeypatch):
    """Both of its cases start from the same weights, though a training step changes them."""
    for name, size in {"STEPS": 4, "BATCH": 3, "HIDDEN": 8, "VOCABULARY": 5}.items():
        monkeypatch.setattr(character_model, name, size)
    for case in cases._character_model():
        if case.missing:
            continue
        contest = case.build()
        for first, again in zip(contest.exact(), contest.exact(), strict=True):
            assert torch.equal(first, again)
        check(contest, contest.exact())


def test_turns_alternate():
    calls = []
    contestants = [Contestant(name, lambda name=name: calls.append(name)) for name in "ab"]
    seconds = take_turns(contestants, budget=0.0)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    order = [name for name, before in zip(calls[2:], calls[1:], strict=False) if name != before]
    assert "".join(order) == "ababab"


def test_figures_are_ratios_of_medians_and_know_their_targets():
    seconds = {OURS: [1.0, 2.0, 4.0], "peer": [4.0, 6.0, 8.0]}
    figures = [times_faster("peer", 3.0), times_slower(OURS, "peer", 0.3, share=0.5), times_faster("absent")]
    faster, slower = lines_of("group", "case", 2, figures, seconds, judge=True)
    assert (faster.value, faster.target, faster.reached) == (3.0, "≥ 3", True)
    assert (slower.value, slower.target, slower.reached) == (pytest.approx(2 / 3), "≤ 0.3", False)
    assert faster.low == 2.5
    assert faster.high == 3.5
    (unjudged,) = lines_of("group", "case", 1, figures[:1], seconds, judge=False)
    assert unjudged.reached is None
    assert "reached" in table([faster])
    assert Figure("any", (OURS,), lambda own: own).reached(1.0) is None


def test_the_programme_names_every_case_once():
    listed = [(case.group, case.cell, case.name) for case in cases.programme(cases.Choice())]
    assert len(set(listed)) == len(listed)
    assert {group for group, _, _ in listed} >= {"training", "ragged", "resets", "layer-norm", "bf16", "ceiling"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_padded_and_packed_peers_compute_the_same(cell, training):
    padded = Problem(cell, 6, 5, 8, training, inputs=3)
    ragged = Problem(cell, 6, 5, 8, training, torch.tensor([2, 6, 1, 5, 3]), layers=2, bidirectional=True)
    for problem in (padded, ragged):
        check(
            Contest(
                [
                    Contestant(OURS, problem.by_us(), judged_by="torch.nn"),
                    Contestant("torch.nn", problem.by_torch()),
                ],
                problem.by_torch(torch.float64),
            ),
            problem.by_torch(torch.float64)(),
        )


def test_loops_over_single_steps_compute_the_same():
    problem = Problem("lstm", 9, 4, 8, reset=torch.rand(9, 4) < 0.3)
    runs = {OURS: problem.by_us(), "a call a step": problem.by_steps(), "LSTMCell": problem.by_cell()}
    exact = problem.by_steps(torch.float64)
    check(Contest([Contestant(name, run) for name, run in runs.items()], exact), exact())


@pytest.mark.parametrize(("peer", "package"), [("onnx", "onnxruntime"), ("jax", "jax")])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_optional_peers_compute_the_same(cell, peer, package):
    pytest.importorskip(package)
    from importlib import import_module

    module = import_module(f"benchmarks.speed.{peer}_peer")
    problem = Problem(cell, 5, 3, 8, training=peer == "jax")
    exact = problem.by_torch(torch.float64)
    check(Contest([Contestant(peer, module.runner(problem), module.read)], exact), exact())


def test_the_layer_normalised_peer_normalises():
    problem = Problem("lstm", 3, 2, 8)
    output = layer_norm.by_torch(problem)()[0]
    scaled = layer_norm.LayerNormLSTM(8)
    torch.manual_seed(1)
    scaled.load_state_dict(layer_norm.LayerNormLSTM(8).state_dict())
    with torch.no_grad():
        scaled.weight_ih_l0 *= 7  # LN(7 u) = LN(u)
        torch.testing.assert_close(scaled(problem.tensors[0]), output, rtol=0, atol=2e-4)


def test_cells_at_equal_budget_make_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 120)
    for only in ("rnn", "mlp"):
        arguments = [str(text), "--minutes", "0.005", "--hidden", "8", "--out", str(tmp_path / "out"), "--only", only]
        monkeypatch.setattr("sys.argv", ["equal_budget", *arguments])
        assert equal_budget.main() == 0
    *table, record = capsys.readouterr().out.splitlines()
    rows = json.loads(record)["rows"]
    assert [row["cell"] for row in rows] == ["mlp", "rnn"]
    assert f"| mlp | {rows[0]['lr']:g} | {rows[0]['steps']:,} | {rows[0]['nats_per_character']:.3f} |" in table[-2]
    for row in rows:
        tried = [json.loads(path.read_text()) for path in (tmp_path / "out").glob(f"{row['cell']}-*/results.json")]
        assert len(tried) == 2
        assert row["nats_per_character"] == min(results["held_out"]["nats_per_token"] for results in tried)
    assert (tmp_path / "out" / "equal_budget.png").stat().st_size > 1000


def test_a_wheel_without_kernels_is_for_every_python():
    """Else pip fails where there is no compiler, instead of installing without kernels: no part of it is compiled for an ABI."""
    with (distribution.SOURCE / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["scikit-build"]
    without = [override for override in settings["overrides"] if override.get("wheel", {}).get("cmake") is False]
    assert [override["wheel"]["py-api"] for override in without] == ["py3"]


def test_what_an_sdist_and_a_wheel_lack_is_told(tmp_path):
    sdist, wheel = tmp_path / "throughtime-1.tar.gz", tmp_path / "throughtime-1.whl"

    def fault(inside: list[str], files: list[str]) -> str | None:
        with tarfile.open(sdist, "w:gz") as archive:
            for name in inside:
                archive.addfile(tarfile.TarInfo(f"throughtime-1/{name}"))
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in files:
                archive.writestr(name, "")
        return distribution.contents_fault(sdist, wheel)

    whole = ["throughtime/app/page/cells.js", "throughtime-1.dist-info/licenses/LICENSE"]
    assert fault(list(distribution.NEEDED), whole) is None
    assert fault(list(distribution.NEEDED[1:]), whole) == "the sdist has no LICENSE"
    assert fault([*distribution.NEEDED, ".venv/bin/python"], whole) == "the sdist has .venv/bin/python"
    assert fault(list(distribution.NEEDED), whole[:1]) == "the wheel has no licence"
    assert fault(list(distribution.NEEDED), whole[1:]) == "the wheel has no pages"


def test_an_installation_is_right_or_said_to_be_wrong(tmp_path, capsys):
    assert installation.main(["--compilers", "no-such-compiler"]) == 0
    assert capsys.readouterr().out == "no-such-compiler  not at hand\n"
    lines = "knows_avx2:INTERNAL=TRUE\nknows_avx512_bf16:INTERNAL=FALSE\nCMAKE_CXX_COMPILER:STRING=g++-9\n"
    (tmp_path / "CMakeCache.txt").write_text(lines, encoding="utf-8")
    assert installation.instruction_sets(tmp_path) == (["generic", "avx2"], ["avx512_bf16"])
    whole = {"runs": ["avx2", "generic"], "error": 1e-6, "tests": {"avx2": "600 passed, 3 skipped in 90.00s"}}
    assert installation.Found("g++-9", "", **whole).is_right
    assert installation.Found("none", "", error=0.0).is_right
    for wrong in (
        {"runs": []},
        {"error": 1e-3},
        {"error": float("nan")},
        {"tests": {"avx2": "1 failed, 5 passed in 9.00s"}},
    ):
        assert not installation.Found("g++-9", "", **{**whole, **wrong}).is_right


@pytest.mark.skipif(native.module is None, reason="streams need the kernels")
def test_calls_of_a_layer_are_checked_and_timed(capsys, monkeypatch):
    monkeypatch.setattr(step, "LAYERS", {"gru": step.LAYERS["gru"]})
    monkeypatch.setattr(step, "SHAPES", [(1, 1), (2, 3)])
    monkeypatch.setattr(step, "SIZES", (16, 64))
    made = {"throughtime": [1.0], "torch.nn": [2.0]}
    monkeypatch.setattr(step, "take_turns", lambda *_, **__: made)
    threads = torch.get_num_threads()
    step.layers_at_few_steps(0.01, quick=True)
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "GRU, I = H = 64, layers 2, threads 2" in printed
    assert "slower than torch.nn in 0" in printed

    class Wrong(throughtime.GRU):
        def forward(self, input, hx=None):
            output, h = super().forward(input, hx)
            return output + 0.001, h

    monkeypatch.setattr(step, "OURS", {"gru": Wrong})
    with pytest.raises(SystemExit, match="throughtime errs by"):
        step.calls("gru", 8, (1, 1), 1)


def test_steps_are_checked_and_timed_beside_the_floor(capsys):
    step.one_step("lstm", 8, budget=0.01)
    printed = capsys.readouterr().out
    for name in ("floor, int8", "stream, float32", "torch.nn, T = 1", "torch cell"):
        assert name in printed
    _, (right, *_), x = step.checked("gru", 8)
    answer = np.stack([right.begin()(row) for row in x[:1]])
    step.check(right, x[:1], answer)
    with pytest.raises(SystemExit, match="float32 errs by"):
        step.check(right, x[:1], answer + 0.001)


def test_a_sweep_draws_the_same_points_again_and_within_its_bounds():
    drawn = list(sweep.points("lstm", 50, 0))
    assert drawn == list(sweep.points("lstm", 50, 0))
    assert drawn != list(sweep.points("lstm", 50, 1))
    for point in drawn:
        assert 1 <= point.batch <= 256
        assert 1 <= point.steps <= 1000
        assert 1 <= point.inputs <= 512
        assert 16 <= point.hidden <= 1024
        assert point.operations <= sweep.MOST
    assert {point.layers for point in drawn} == {1, 2}
    assert {point.training for point in drawn} == {True, False}


def test_a_points_operations_are_those_of_its_products():
    point = sweep.Point("gru", batch=2, steps=5, inputs=3, hidden=4, layers=2, training=False)
    assert point.operations == 2 * 2 * 5 * (12 * (3 + 4) + 12 * (4 + 4))
    assert sweep.Point(*list(vars(point).values())[:-1], training=True).operations == 3 * point.operations


def test_a_sweep_times_what_is_right_and_names_the_slow_and_the_wrong(monkeypatch):
    point = sweep.Point("rnn", batch=2, steps=3, inputs=4, hidden=16, layers=1, training=True)
    timed = sweep.time_one(point, 0.01)
    assert not timed.wrong
    assert timed.ours > 0
    monkeypatch.setattr(Problem, "by_us", lambda self: lambda: [result + 0.1 for result in self.by_torch()()])
    assert "throughtime: result 0 errs by" in sweep.time_one(point, 0.01).wrong
    lines = sweep.summary(
        "rnn", [sweep.Timed(point, 2.0, 1.0), sweep.Timed(point, 1.0, 2.0), sweep.Timed(point, wrong="it errs")]
    )
    assert lines[0].endswith("training: it errs")
    assert "ours 1.00 (geometric mean of 2 points), 1 below 0.95 at T > 1; the worst 0.50" in lines[1]
    assert lines[2].startswith("   0.50   2000.000 ms  rnn B2 T3 I4 H16 L1, training")


@pytest.mark.parametrize("situation", pools.SITUATIONS)
def test_a_call_beside_others_is_checked_before_it_is_timed(situation, monkeypatch):
    if situation == "onnxruntime":
        pytest.importorskip("onnxruntime")
    problem = Problem("gru", 3, 2, 16)
    found = pools.measure(situation, problem, turns=1)
    assert found["torch.nn / ours, beside"] > 0
    assert 0 <= found["alone"] <= 1
    assert ("as slow as one thread" if situation == "turns" else "beside / at rest, ours") in found
    monkeypatch.setattr(Problem, "by_us", lambda self: lambda: [result + 0.1 for result in self.by_torch()()])
    with pytest.raises(WrongAnswerError, match="throughtime: result 0 errs by"):
        pools.measure(situation, problem, turns=1)


@pytest.mark.parametrize("name", options.OPTIONS)
def test_an_option_is_checked_before_it_is_timed(name, monkeypatch):
    monkeypatch.setattr(options, "STEPS", 12)
    monkeypatch.setattr(options, "HIDDEN", 80)
    option = options.OPTIONS[name]
    step = options.Step(option.cells[0], option, "float32")
    step.check()
    assert options.medians({"one": step}, 1)["one"] > 0
    monkeypatch.setitem(options.TOLERANCE, "float32", -1.0)
    with pytest.raises(SystemExit, match=r"in float32 is .* away from the equations"):
        step.check()


def test_an_options_limit_is_that_of_its_dtype():
    assert options.limit("plain", "float64", True) == 2.2
    assert options.limit("layer_norm", "bf16 autocast", True) == 0.8
    assert options.limit("layer_norm", "bf16 autocast", False) == 1.3
    assert options.limit("both ways", "bfloat16", True) == 1.2
    assert options.limit("reset", "f16 autocast", True) == 1.3
    assert options.limit("plain", "float32", True) is None


def test_two_installations_are_compared_in_turns(capsys, monkeypatch):
    smallest = "RNN B4 T20 I16 H32, the smallest, training"
    given = ["versions", sys.executable, sys.executable, "--match", smallest, "--turns", "3"]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(versions, "SLOWER", 1e9)
    assert versions.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(smallest)
    assert lines[1].startswith("0 slower by more than")
    monkeypatch.setattr(versions, "SLOWER", 0.0)
    assert versions.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"  {smallest}"


def test_an_interpreter_that_fails_ends_the_comparison():
    python = versions.Installation(sys.executable, 1)
    with contextlib.closing(python), pytest.raises(SystemExit, match="an interpreter ended with exit code"):
        python.seconds("case('NoSuchLayer', 1, 1, 1, 1, 'training', {})")


def packaged(change=None):
    """Return what makes a package's cases, of which `change` spoils our side."""

    def made():
        model = torch.nn.GRU(3, 4)
        x = torch.randn(5, 2, 3)
        for case in clients.converted("a GRU", model, lambda layer: layer(x)[0]):
            yield case if change is None else case._replace(ours=lambda case=case: [*map(change, case.ours())])

    return made


def test_packages_are_converted_checked_and_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(clients, "CLIENTS", {"torch": packaged(), "no-such-package": packaged()})
    monkeypatch.setattr(clients, "measure_apart", lambda client, budget, _: list(clients.measure(client, budget)))
    assert clients.main(["--only", "torch", "no-such-package", "--budget", "0", "--out", str(tmp_path)]) == 0
    assert "| no-such-package |  | left out: it isn't installed" in capsys.readouterr().out
    (file,) = tmp_path.glob("clients-*.json")
    inference, training, absent = json.loads(file.read_text(encoding="utf-8"))["cases"]
    assert (inference["what"], training["what"]) == ("a GRU, inference", "a GRU, training")
    for case in (inference, training):
        assert case["difference"] < 1e-5
        assert case["theirs"] > 0
        assert case["ours"] > 0
    assert absent["left_out"]


@pytest.mark.parametrize(
    "change", [lambda found: found + 0.01, lambda found: found * torch.nan, lambda found: found[:1]]
)
def test_a_package_with_other_numbers_is_said_to_be_wrong_and_not_timed(monkeypatch, change):
    monkeypatch.setattr(clients, "CLIENTS", {"torch": packaged(change)})
    for timed in clients.measure("torch", 0.0):
        assert timed.wrong.startswith("differs by")
        assert timed.theirs is None
        assert "WRONG" in clients.line_of(timed)


def test_a_package_that_cannot_be_imported_is_left_out_with_the_reason(monkeypatch):
    def broken():
        clients.without_its_init("no_such_package")
        yield from ()

    monkeypatch.setattr(clients, "CLIENTS", {"torch": broken})
    (timed,) = clients.measure("torch", 0.0)
    assert timed.left_out == "ModuleNotFoundError: No module named 'no_such_package'"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_several_processes_are_compared_with_one(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    small = [str(text), "--steps", "3", "--batch", "4", "--hidden", "8", "--turns", "1"]
    assert ranks.main(small) == 0
    assert "2 processes: " in capsys.readouterr().out
    found = iter([1.0, 1.01])
    monkeypatch.setattr(ranks, "train", lambda *_: {"steps": 3, "seconds": 1.0, "nats_per_token": next(found)})
    assert ranks.main(small) == 1


KERNEL = '''
@jit(cache=1)
def kernel(base, n: tl.constexpr = 4, is_row: "n + 1" = None):
    """π: what takes two bytes."""
    x = tl.load(base + n, mask=n < 5, other=0, volatile=True)
    if n == 1 or not is_row:
        x = tl.where(is_row, x, -x)
    x += 1 - n
    tl.store(base, x, mask=is_row)
    return x
'''


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("arithmetic", ["+ -> -", "+= -> -=", "- -> +"]),
        ("comparison", ["< -> <=", "== -> !="]),
        ("constant", ["4 -> 5", "4 -> 3", "5 -> 6", "5 -> 4", "0 -> 1", "0 -> (-1)", *["1 -> 2", "1 -> 0"] * 2]),
        ("one", ["1 - n -> n"]),
        (
            "access",
            [
                "base + n, mask=n < 5, other=0, volatile=True -> base + n, mask=n < 5, other=0",
                "base + n, mask=n < 5, other=0, volatile=True -> base + n, mask=n < 5, volatile=True",
                "base + n, mask=n < 5, other=0, volatile=True -> base + n, volatile=True",
                "base, x, mask=is_row -> base, x",
            ],
        ),
        ("where", ["x, -x -> -x, x"]),
        ("logic", ["or -> and", "not is_row -> is_row"]),
        ("condition", ["n == 1 or not is_row -> not (n == 1 or not is_row)"]),
        (
            "statement",
            ["x = tl.where(is_row, x, -x) -> pass", "x += 1 - n -> pass", "tl.store(base, x, mask=is_row) -> pass"],
        ),
    ],
)
def test_mutants_of_each_kind_are_made(kind, changes):
    found = [m for m in mutants.mutations("kernel.py", KERNEL) if m.kind == kind]
    assert sorted(f"{m.before} -> {m.after}" for m in found) == sorted(changes)
    for mutation in found:
        text = mutants.mutated(KERNEL, mutation)
        compile(text, "kernel.py", "exec")
        before, after = KERNEL.splitlines(), text.splitlines()
        assert [n + 1 for n in range(len(before)) if before[n] != after[n]] == [mutation.line]


def test_kinds_of_mutants_take_turns_and_a_seed_draws_the_same():
    found = mutants.mutations("kernel.py", KERNEL)
    drawn = mutants.draw(found, 12, 3)
    assert [m.kind for m in drawn[:9]] == [kind.__name__ for kind in mutants.KINDS]
    assert drawn == mutants.draw(found, 12, 3) != mutants.draw(found, 12, 4)
    assert sorted(mutants.draw(found, 1000, 3)) == found
    with pytest.raises(SystemExit, match=r"kernel\.py:\d+ has changed since"):
        mutants.mutated("\n" + KERNEL, drawn[0])


def test_a_mutant_is_caught_and_the_tree_as_it_is_passes(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    source = (mutants.SOURCE / mutants.KERNELS / "arithmetic.py").read_text(encoding="utf-8")
    wrong, harmless = (
        next(m for m in mutants.mutations("arithmetic.py", source) if (m.before, m.after) == change)
        for change in (("1.0 + power", "power"), ("<", "<="))  # of two branches that meet there
    )
    monkeypatch.setattr(mutants, "draw", lambda *_: [wrong, harmless])
    quick = ["--tests", "tests/kernels/test_triton.py::test_every_cell[rnn_tanh]", "--out", str(tmp_path)]
    assert mutants.main(quick) == 0
    said = capsys.readouterr().out
    assert (
        "TRITON_INTERPRET" not in os.environ
    )  # or all that is tested later would be interpreted, where there is no GPU
    assert f"{wrong}  caught by test_every_cell[rnn_tanh]\n" in said
    assert f"{harmless}  SURVIVED\n" in said
    assert "2 mutants, 1 caught, 1 survived" in said
    (file,) = tmp_path.glob("mutants-*.json")
    assert mutants.survivors_of(file) == [harmless]
    assert (mutants.SOURCE / mutants.KERNELS / "arithmetic.py").read_text(encoding="utf-8") == source


def test_what_is_no_run_of_mutants_is_refused_in_a_line(tmp_path):
    file = tmp_path / "other.json"
    file.write_text("[]")
    for path in (file, tmp_path / "none.json"):
        with pytest.raises(SystemExit, match="isn't a file that this script wrote"):
            mutants.main(["--again", str(path)])

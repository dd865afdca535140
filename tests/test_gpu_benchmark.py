"""The GPU benchmark, tried without a GPU: who is left out says why, who is wrong isn't timed, and the rest goes on."""

import json
import re
import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import cases, peers, preparation
from benchmarks.gpu.contest import BFLOAT16, FLOAT32, TF32, Contest, Contestant, Figure, Numerics, Passes, errors, judge
from benchmarks.gpu.holding import Line, Row, hold, lines
from benchmarks.gpu.problem import DOUBLE, Problem
from benchmarks.gpu.report import plain_table, table
from benchmarks.gpu.timing import Pace, TooSlowError, at_most, take_turns

CPU = torch.device("cpu")
QUICK = cases.Setting(CPU, "auto", is_quick=True)


def run(capsys, *arguments):
    code = program.main(["--device", "cpu", "--quick", "--turns", "1", *arguments])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("case", ["resets", "ragged", "layer_norm", "long"])
def test_a_case_is_checked_timed_and_written(case, tmp_path, capsys):
    code, out = run(capsys, "--case", case, "--json", str(tmp_path / "gpu.json"))
    assert code == 0, out
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["machine"]["device"] == "cpu"
    assert {"date", "packages", "commit"} <= set(written["machine"])
    assert {contest["case"] for contest in written["contests"]} == {case}
    rows = [row for contest in written["contests"] for row in contest["rows"]]
    for row in rows:
        needs_cuda = row["reason"] == "it needs a CUDA device"
        assert row["status"] == ("left out" if needs_cuda else "right"), row
        assert bool(row["forward"]) is bool(row["training"]) is not needs_cuda
        if row["is_ours"]:
            assert row["times_judge"] <= 3
    assert any(row["is_ours"] for row in rows)
    assert all(contest["figures"] for contest in written["contests"])
    assert "0 answers wrong" in out
    assert "MISSED" not in out


def test_autos_choice_is_one_table(capsys):
    code, out = run(capsys, "--case", "plain")
    assert code == 0, out
    assert "torch's time / ours, by B" in out
    assert "LSTM bfloat16 H8" in out
    assert "0 answers wrong" in out


def altered(original, change):
    def by_us(self, numerics, backend):
        passes = original(self, numerics, backend)
        return passes._replace(training=lambda: change(passes.training())) if backend == "auto" else passes

    return by_us


def spoil_a_gradient(results):
    results[2] = results[2] * 1.5
    return results


def fail(results):
    raise ValueError("out of luck\nand a long trace")


def test_a_wrong_gradient_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(Problem, "by_us", altered(Problem.by_us, spoil_a_gradient))
    code, out = run(capsys, "--case", "ragged")
    assert code == 1
    assert "WRONG: ∂weight_ih_l0 errs by" in out
    assert "1 answers wrong" in out
    assert "torch.nn, PackedSequence / throughtime" not in out


def test_a_failure_of_ours_is_one_line_and_the_rest_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(Problem, "by_us", altered(Problem.by_us, fail))
    code, out = run(capsys, "--case", "ragged", "long")
    assert code == 1
    assert len(re.findall(r"^  throughtime, bfloat16 +bfloat16  failed: ValueError: out of luck$", out, re.M)) == 2
    assert "failed: 2 of ours, 0 peers" in out


def test_a_failing_peer_does_not_end_the_run(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(peers, "segments", broken)
    code, out = run(capsys, "--case", "resets")
    assert code == 0
    assert out.count("failed: RuntimeError: no such kernel") == 4
    assert "failed: 0 of ours, 4 peers" in out


def test_ours_may_err_three_times_its_judges_error_and_no_more():
    ours = Contestant("throughtime", FLOAT32, lambda: pytest.fail("is not run"), judged_by="peer")
    names = ["output", "∂input"]
    verdict = judge(ours, [1e-5, 2.9e-5, 1e-6], [1e-5, 1e-5, 1e-6], names)
    assert (verdict.wrong, verdict.error, verdict.times_judge) == (None, 2.9e-5, pytest.approx(2.9))
    assert "∂input errs by 3.1e-06" in str(judge(ours, [1e-6, 1e-6, 3.1e-6], [1e-6] * 3, names).wrong)
    assert "output without gradients" in str(judge(ours, [1e-4, 1e-6, 1e-6], [1e-6] * 3, names).wrong)
    assert judge(ours, [7e-7] * 3, [0.0] * 3, names).wrong is None  # two units in the last place are forgiven
    assert judge(ours, [float("inf"), 0.0, 0.0], [1e-6] * 3, names).wrong


def test_a_judge_who_need_not_use_tf32_forgives_its_rounding_and_no_more():
    ours = Contestant("throughtime", TF32, lambda: pytest.fail("is not run"), judged_by="peer")
    assert judge(ours, [1.4e-3] * 2, [1e-7] * 2, ["output"]).wrong is None
    assert judge(ours, [1.6e-3] * 2, [1e-7] * 2, ["output"]).wrong
    assert judge(ours, [2.9e-3] * 2, [1e-3] * 2, ["output"]).wrong is None


@pytest.mark.parametrize(("numerics", "error"), [(FLOAT32, 2e-3), (TF32, 4e-2), (BFLOAT16, 0.3)])
def test_a_peer_need_only_be_sane(numerics: Numerics, error):
    peer = Contestant("peer", numerics, lambda: pytest.fail("is not run"))
    assert judge(peer, [error] * 2, None, ["output"]).wrong
    assert judge(peer, [error / 3] * 2, None, ["output"]).wrong is None


def test_errors_are_relative_and_see_what_is_no_number():
    right = torch.tensor([2.0, -4.0], dtype=torch.float64)
    assert errors([right + 0.4], [right]) == [pytest.approx(0.1)]
    assert errors([right * torch.nan], [right]) == [float("inf")]
    with pytest.raises(ValueError, match=r"\(1,\), expected \(2,\)"):
        errors([right[:1]], [right])
    with pytest.raises(ValueError, match="0 results"):
        errors([], [right])


def contest_of(*contestants: Contestant) -> Contest:
    return Contest(
        "title",
        contestants,
        lambda: of(torch.ones(3).double()),
        lambda: ["output"],
        [Figure("throughtime", ["peer"], 2.0)],
    )


def of(result: torch.Tensor) -> Passes:
    return Passes(lambda: [result], lambda: [result])


def test_who_was_not_compiled_in_time_is_left_out_but_ours_tries():
    def refuse() -> Passes:
        raise NotImplementedError("backend='triton' can't serve this: no float16")

    ours = Contestant("throughtime", FLOAT32, lambda: of(torch.ones(3)), "peer", compiles="slow")
    refused = Contestant("throughtime, another", FLOAT32, refuse, "peer")
    peer = Contestant("peer", FLOAT32, lambda: of(torch.ones(3)), compiles="slow")
    rows = hold(contest_of(ours, refused, peer), CPU, Pace(1, 0.1, 0.0), {"slow": "not compiled within 70 s"})
    assert [(row.status, row.judged_by) for row in rows] == [("right", ""), ("left out", ""), ("left out", "")]
    assert "no float16" in rows[1].reason
    assert rows[2].reason == "not compiled within 70 s"
    assert not lines(rows, [Figure("throughtime", ["peer"], 2.0)], has_targets=True)


def test_what_takes_too_long_is_ended():
    with pytest.raises(TooSlowError, match="its check took more than 0 s"), at_most(0.05, "its check"):
        time.sleep(20)
    with at_most(20, "nothing"):
        pass


def test_turns_alternate_and_the_slow_have_fewer():
    order = []
    runs = {name: (lambda name=name: order.append(name), FLOAT32) for name in "ab"}
    times = take_turns(runs, CPU, Pace(turns=5, limit=1.0, block=0.0))
    assert "".join(order) == "ab" * 6
    assert [len(taken) for taken in times.values()] == [5, 5]
    times = take_turns(runs, CPU, Pace(turns=5, limit=0.0, block=0.0))
    assert [len(taken) for taken in times.values()] == [3, 3]


def test_a_figure_is_against_the_fastest_peer_and_knows_its_target():
    def row(name: str, forward: float, training: float) -> Row:
        return Row(name, "float32", name == "ours", "right", forward=[forward] * 3, training=[training] * 3)

    rows = [row("ours", 1, 2), row("slow", 8, 9), row("quick", 3, 5)]
    figures = [Figure("ours", ["slow", "quick"], 2.6), Figure("ours", ["quick"], at_most=0.5)]
    above, below = lines(rows, figures, has_targets=True)
    assert above == Line("ours", "quick", 3.0, 2.5, "≥ 2.6", False)
    assert (below.training, below.target, below.reached) == (pytest.approx(0.4), "≤ 0.5", True)
    assert lines(rows, figures, has_targets=False)[0].reached is None
    shown = table("title", rows, [above, below])
    assert "quick / ours: forward 3.00, forward and backward 2.50   ≥ 2.6 MISSED" in shown
    assert "ours / quick: forward 0.33, forward and backward 0.40   ≤ 0.5 reached" in shown
    ratio = Line("", "", 1.0, 5.0, "", None)
    shown = plain_table({"LSTM TF32 H8 B4": ratio}, {"LSTM TF32 H8 B16": "over", "LSTM TF32 H9 B4": "over"})
    assert re.search(r"^  LSTM TF32 H8 +5\.00 +– +1\.00 +–$", shown, re.M)
    assert shown.endswith("  2 not timed: over")


def test_tf32_is_allowed_only_while_it_is_in_force():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for numerics in (TF32, FLOAT32):
        with numerics.in_force():
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is numerics.tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_names_are_met_once_and_figures_name_contestants():
    setting = cases.Setting(CPU, "auto")
    for case, contests in cases.cases(setting).items():
        made = list(contests())
        titles = [contest.title for contest in made]
        assert len(set(titles)) == len(titles), case
        for contest in made:
            names = [one.name for one in contest.contestants]
            assert len(set(names)) == len(names)
            on_cuda = {f"throughtime, {name}" for name in ("float16",)}
            for figure in contest.figures:
                assert {figure.ours, *figure.peers} <= {*names, *on_cuda}
            assert {one.judged_by for one in contest.contestants if one.judged_by} <= set(names)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_loops_and_segments_compute_what_our_layer_does(cell):
    reset = torch.rand(9, 4, generator=torch.Generator().manual_seed(1)) < 0.3
    problem = Problem(cell, 9, 4, 5, CPU, reset=reset)
    exact = peers.cell_loop(problem, DOUBLE).training()
    for passes in (peers.segments(problem, DOUBLE), problem.by_us(DOUBLE, "reference")):
        for given, right in zip(passes.training(), exact, strict=True):
            torch.testing.assert_close(given, right, rtol=1e-9, atol=1e-12)


def test_every_compiling_contestant_can_be_prepared_by_its_name(monkeypatch):
    keys = [(case, one.compiles) for case in cases.cases(QUICK) for one in preparation.compiling(QUICK, case)]
    assert ("long", "long bfloat16") in keys
    assert ("plain", "gru TF32") in keys
    ran = []
    monkeypatch.setattr(preparation, "answer", ran.append)
    preparation.run_once(QUICK, "plain", "gru TF32")
    assert len(ran) == 2


def test_preparation_tells_who_was_too_slow_and_who_failed(monkeypatch, capsys):
    def begin(case, key, options, said):
        code = {"slow": "import time; time.sleep(60)", "bad": "raise ValueError('no compiler')"}.get(key, "")
        with said.open("wb") as errors:
            process = preparation.subprocess.Popen([sys.executable, "-c", code], stderr=errors, start_new_session=True)
        return preparation._Child(case, key, process, said)

    contestants = [Contestant(key, FLOAT32, lambda: of(torch.ones(1)), compiles=key) for key in ("slow", "bad", "fine")]
    monkeypatch.setattr(preparation, "_begin", begin)
    monkeypatch.setattr(preparation, "compiling", lambda *_: contestants)
    monkeypatch.setattr(preparation, "LEAST", 1.0)
    given_up = preparation.prepare(QUICK, ["long"], 30.0, 1.5, [])
    assert given_up == {"long": {"slow": "not compiled within 2 s"}}
    assert "preparing long, bad: ValueError: no compiler" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        program.main([])
    assert stopped.value.code == 2
    assert "there is no CUDA device" in capsys.readouterr().err

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from throughtime.app import cli, errors

Call = Callable[..., "Ended"]
COMMANDS = ("train", "eval", "score", "sample", "explain", "info", "plot", "demo")
SMALL = ("--steps", 12, "--hidden", 8, "--batch", 4, "--bptt", 16)
UNSAID = {  # defaults that depend, or that are said in another way
    "minutes": 3,
    "tied": "no-tied",
    "locked": "no-locked",
    "tensorboard": "no-tensorboard",
    "layer_norm": "no-layer-norm",
    "vocabulary": "10000 words, 2000 bpe tokens",
    "split_punctuation": "split-punctuation",
    "grow_vocabulary": "grow-vocabulary",
    "embedding": "0, H for words and bpe",
    "batch": "32, fewer of a short text",
    "bptt": "64, fewer of a short text",
}
EVALUATION = (
    *("nats_per_token", "bits_per_character", "bits_per_byte", "perplexity", "tokens", "method"),
    *("unknown", "nats_per_token_without_unknown", "perplexity_without_unknown"),
)


def program(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "throughtime", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **settings)  # type: ignore[call-overload]


class TestHelp:
    def test_without_arguments_the_program_explains_itself(self, throughtime: Call) -> None:
        ended = throughtime()
        assert ended.code == 0
        assert all(command in ended.out for command in COMMANDS)
        assert "throughtime explain ybigta" in ended.out
        assert not ended.err

    @pytest.mark.parametrize("command", ["train", "eval", "sample", "explain", "info"])
    def test_without_arguments_a_command_explains_itself_with_an_example(self, command: str, throughtime: Call) -> None:
        ended = throughtime(command)
        assert ended.code == 0
        assert f"Usage: throughtime {command}" in ended.out
        assert f"Example  throughtime {command}" in ended.out
        assert not ended.err

    def test_the_defaults_that_help_tells_are_those_of_training(self) -> None:
        from throughtime.lm.training import TrainingOptions

        told = {
            parameter.name: parameter.help.partition("Default ")[2].removesuffix(".[/]")
            for parameter in cli.typer.main.get_command(cli.app).commands["train"].params
            if parameter.name in {field.name for field in fields(TrainingOptions)}
        }
        given = [field for field in fields(TrainingOptions) if field.name != "from_weights"]  # --from finds them
        assert set(told) == {field.name for field in given}, "an option without a flag"
        for field in given:
            usual = UNSAID.get(field.name, field.default)
            shown = "" if usual is None else f"{usual:g}" if isinstance(usual, float) else str(usual)
            assert told[field.name] == shown, f"app/cli.py tells another default of --{field.name}"

    def test_help_is_answered_without_loading_torch(self) -> None:
        script = (
            "import sys, types, pathlib, importlib.util\n"
            "package = types.ModuleType('throughtime')\n"  # what the package itself imports is not the command line's doing
            "package.__path__ = importlib.util.find_spec('throughtime').submodule_search_locations\n"
            "sys.modules['throughtime'] = package\n"
            "from throughtime.app.cli import main\n"
            "main(['--help']); main(['train', '--help']); main(['train', '--hiden', '3'])\n"
            "sys.exit('torch' in sys.modules)\n"
        )
        assert (
            subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=False).returncode == 0
        )


class TestTrain:
    def test_a_run_is_trained_measured_and_reported(self, throughtime: Call, text: Path, tmp_path: Path) -> None:
        ended = throughtime("train", text, "--out", tmp_path / "run", *SMALL)
        assert ended.code == 0
        assert "bits per character" in ended.out
        assert "LSTM, 1 layer of 8, one-hot input" in ended.err
        assert "step 12" in ended.err
        assert f"throughtime sample {tmp_path / 'run'}" in ended.err

    def test_missing_kernels_are_told_in_one_line(
        self, throughtime: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from throughtime.kernels import native

        monkeypatch.setattr(native, "missing", "throughtime's C++ kernels can't be loaded (GLIBC is too old)")
        monkeypatch.setattr(native, "_has_warned", False)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            ended = throughtime("train", text, "--out", tmp_path / "run", *SMALL)
        assert ended.code == 0
        (line,) = [line for line in ended.err.splitlines() if "C++ kernels" in line]
        said = "warning: throughtime's C++ kernels can't be loaded (GLIBC is too old), so layers on the CPU take up to"
        assert line.startswith(f"throughtime train: {said}")
        assert ".py" not in line

    def test_json_is_one_object_and_alone_on_stdout(self, throughtime: Call, text: Path, tmp_path: Path) -> None:
        ended = throughtime("train", text, "--out", tmp_path / "run", *SMALL, "--json")
        assert ended.code == 0
        assert ended.out.count("\n") == 1
        assert set(ended.json) == {
            *("run", "steps", "seconds", "interrupted", "clip_share", "best_step", "stopped_early", "rollbacks"),
            "longer",
            *EVALUATION,
        }
        assert ended.json["steps"] == 12
        assert ended.json["interrupted"] is False
        assert 0 < ended.json["nats_per_token"] < math.log(30)

    def test_every_option_reaches_training(self, throughtime: Call, text: Path, tmp_path: Path) -> None:
        given = {
            "level": "byte", "cell": "gru", "hidden": 6, "layers": 2, "embedding": 5, "dropout": 0.1, "steps": 3, "batch": 2,
            "bptt": 8, "optimizer": "sgd", "lr": 0.01, "weight_decay": 0.001, "warmup": 0.1, "clip": 0.5, "clip_value": 0.2,
            "seed": 7, "split": 0.8, "include": "*.txt", "device": "cpu", "mode": "sentence", "sequence": "file",
            "min_count": 3, "window": 5,
            "ema": 0.9, "eval_every": 2, "patience": 2, "rollbacks": 1, "embedding_dropout": 0.1, "gradients_every": 2,
            "momentum": 0.5, "nonmonotone": 3, "schedule": "linear", "final_lr": 0.1, "lr_decay": 0.5, "lr_decay_after": 1.0,
            "init": "update:2+orthogonal:0.9",
            "init_range": 0.2, "weight_drop": 0.2, "recurrent_dropout": 0.1, "zoneout": 0.0, "ar": 2.0, "tar": 1.0,
            "dtype": "bfloat16",
        }  # fmt: skip
        flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
        texts = tmp_path / "texts"
        texts.mkdir()
        for number in range(3):
            (texts / f"{number}.txt").write_bytes(text.read_bytes())
        assert (
            throughtime("train", texts, "--out", tmp_path / "run", *flags, "--tied", "--locked", "--layer-norm").code
            == 0
        )
        record = throughtime("info", tmp_path / "run", "--json").json
        assert record["options"] == given | {
            "preset": None,
            "tied": True, "minutes": None, "epochs": None, "vocabulary": None, "split_punctuation": True, "locked": True,
            "tensorboard": False,
            "layer_norm": True,
            "from_weights": None, "freeze": None, "grow_vocabulary": True,
        }  # fmt: skip

    def test_a_time_chooses_the_rest_and_says_so(self, throughtime: Call, text: Path, tmp_path: Path) -> None:
        ended = throughtime("train", text, "--out", tmp_path / "run", "--minutes", 0.002, "--hidden", 9)
        assert ended.code == 0
        assert "chosen for 0.002 minutes of 0.0 MB" in ended.err
        options = throughtime("info", tmp_path / "run", "--json").json["options"]
        assert (options["hidden"], options["final_lr"]) == (9, 0.0)

    def test_what_is_left_out_of_a_folder_is_said_once_and_told_by_info(
        self, throughtime: Call, text: Path, run: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "texts"
        folder.mkdir()
        shutil.copy(text, folder / "a.txt")
        shutil.copy(text, folder / "b.txt")
        (folder / "again.txt").symlink_to(folder / "a.txt")
        shutil.copytree(run, folder / "run")
        for number in range(30):
            (folder / f"latin{number:02}.txt").write_bytes(b"caf\xe9 " * 50)
        new = folder / "new"
        ended = throughtime("train", folder, "--out", new, *SMALL)
        assert ended.code == 0, ended.err
        said = [line for line in ended.err.splitlines() if line.startswith(("left out", "copies"))]
        assert said == [
            f"left out: 30 files not UTF-8 text, first {folder}/latin00.txt (byte 0xe9 at position 3 is not UTF-8; convert it "
            f"to UTF-8, or train with --level byte for other encodings); 1 run, first {folder}/run; 1 file met again, "
            f"first {folder}/again.txt (the same file as {folder}/a.txt); throughtime info {new} tells more",
            f"copies: 1 file with the text of another, first {folder}/b.txt; what is held out may be trained on too",
        ]
        told = throughtime("info", new).out
        assert "latin07.txt" in told.replace("\n", "").replace(" ", "")
        assert "and 12 more; --json lists them all" in told
        listed = throughtime("info", new, "--json").json["data"]
        assert len(listed["left_out"]) == 32
        assert listed["left_out"][0] == {"path": f"{folder}/run", "kind": "run", "reason": "a run, not text"}
        assert listed["copies"] == [f"{folder}/b.txt"]

    @pytest.mark.parametrize("length", [5, 34, 700, 2276, 2277])
    def test_a_short_text_gets_a_smaller_window(self, throughtime: Call, tmp_path: Path, length: int) -> None:
        path, run = tmp_path / "short.txt", tmp_path / "run"
        path.write_text(("hello world, this is a short text" * 99)[:length])
        ended = throughtime("train", path, "--out", run, "--steps", 2, "--hidden", 8, "--json")
        assert ended.code == 0, ended.err
        options = throughtime("info", run, "--json").json["options"]
        if length == 2277:
            assert (options["batch"], options["bptt"]) == (32, 64)
            assert "short" not in ended.err
            return
        assert f": chosen --batch {options['batch']}  --bptt {options['bptt']}\n" in ended.err
        tokens = int(length * 0.9) if length > 5 else 3
        assert f"the text is short, {tokens:,} tokens to train on" in ended.err
        read = (tokens - 1) // options["batch"] // options["bptt"] * options["batch"] * options["bptt"]
        assert read > 0.9 * (tokens - 1)
        for flag in ("--batch", "--bptt"):
            again = throughtime("train", path, "--out", tmp_path / "other", "--steps", 2, flag, 64)
            assert again.code == errors.BAD_INPUT
            assert "lower --batch or --bptt" in again.err

    def test_a_refused_run_leaves_nothing_behind(self, throughtime: Call, text: Path, tmp_path: Path) -> None:
        (tmp_path / "one.txt").write_text("one long line " * 50)
        (tmp_path / "kept").mkdir()
        for arguments in (["--mode", "sentence"], ["--batch", 999], ["--hidden", 10**7]):
            for out in ("new/deeper/run", "kept"):
                ended = throughtime("train", tmp_path / "one.txt", "--out", tmp_path / out, *arguments)
                assert ended.code == errors.BAD_INPUT
                assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "one.txt"]

    def test_a_recipe_by_name(self, throughtime: Call, text: Path, tmp_path: Path) -> None:
        small = ("--hidden", 4, "--embedding", 4, "--steps", 2, "--batch", 2, "--bptt", 3)
        ended = throughtime("train", text, "--out", tmp_path / "run", "--preset", "zaremba-small", *small)
        assert ended.code == 0
        assert "chosen" not in ended.err
        options = throughtime("info", tmp_path / "run", "--json").json["options"]
        assert (options["preset"], options["lr"], options["init_range"], options["hidden"]) == (
            "zaremba-small",
            20.0,
            0.1,
            4,
        )

    def test_measurements_along_the_way_are_said(self, throughtime: Call, text: Path, tmp_path: Path) -> None:
        ended = throughtime("train", text, "--out", tmp_path / "run", *SMALL, "--eval-every", 6)
        assert ended.code == 0
        assert "step 6: " in ended.err
        assert "on held-out text, the best so far" in ended.err
        assert "best weights" in ended.out
        last = throughtime("eval", tmp_path / "run", text, "--last", "--json").json
        assert 0 < last["nats_per_token"] < math.log(30)

    def test_options_are_read_from_a_file_and_flags_override_it(
        self, throughtime: Call, text: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "options.toml").write_text('cell = "gru"\nhidden = 9\nbatch = 4\nbptt = 16\nminutes = 5\n')
        ended = throughtime(
            "train", text, "--out", tmp_path / "run", "--config", tmp_path / "options.toml", "--hidden", 7, "--steps", 2
        )
        assert ended.code == 0
        options = throughtime("info", tmp_path / "run", "--json").json["options"]
        assert (options["cell"], options["hidden"], options["steps"], options["minutes"]) == ("gru", 7, 2, None)

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(
        self, throughtime: Call, text: Path, tmp_path: Path, number: int, code: int
    ) -> None:
        run = tmp_path / "run"
        arguments = [
            "train",
            str(text),
            "--out",
            str(run),
            "--hidden",
            "8",
            "--batch",
            "2",
            "--steps",
            "20000",
            "--json",
        ]
        with subprocess.Popen(
            [sys.executable, "-m", "throughtime", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as process:
            while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        assert process.returncode == code
        assert f"throughtime train --resume {run}" in err.splitlines()[-1]
        assert "Traceback" not in err
        stopped = json.loads(out)
        assert stopped["interrupted"]
        assert stopped["nats_per_token"] is None
        assert 0 < stopped["steps"] < 20000
        assert throughtime("sample", run, "--length", 5).code == 0

    def test_a_resumed_run_goes_on_to_its_end(
        self, throughtime: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from throughtime.app import progress

        def stop_at_five(shown: object, run: Path, reason: str | None) -> Callable[[object], None]:
            def observe(report: object) -> None:
                if report.step == 5:
                    signal.raise_signal(signal.SIGINT)

            return observe

        with monkeypatch.context() as patched:
            patched.setattr(progress, "observed", stop_at_five)
            ended = throughtime("train", text, "--out", tmp_path / "run", *SMALL)
        assert ended.code == errors.INTERRUPTED
        assert f"throughtime train --resume {tmp_path / 'run'}" in ended.err
        resumed = throughtime("train", "--resume", tmp_path / "run", "--json")
        assert resumed.code == 0
        assert resumed.json["steps"] == 12
        unbroken = throughtime("train", text, "--out", tmp_path / "unbroken", *SMALL, "--json")
        assert resumed.json["nats_per_token"] == unbroken.json["nats_per_token"]

    def test_ctrl_c_before_the_first_step_leaves_nothing_half_done(
        self, throughtime: Call, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["throughtime.lm.training"], "build_corpus", interrupted)
            ended = throughtime("train", text, "--out", tmp_path / "run", *SMALL)
        assert ended.code == errors.INTERRUPTED
        assert ended.err == "stopped; nothing was trained yet\n"
        assert throughtime("train", text, "--out", tmp_path / "run", *SMALL).code == 0


class TestReading:
    def test_eval_prints_the_five_numbers(self, throughtime: Call, run: Path, text: Path) -> None:
        shown, record = throughtime("eval", run, text), throughtime("eval", run, text, "--json")
        assert shown.code == record.code == 0
        assert tuple(record.json) == EVALUATION
        assert record.json["tokens"] == len(text.read_text()) - 1
        assert record.json["perplexity"] == pytest.approx(math.exp(record.json["nats_per_token"]))
        assert f"{record.json['nats_per_token']:.4f}" in shown.out

    def test_eval_tells_how_many_characters_are_unknown(self, throughtime: Call, run: Path, tmp_path: Path) -> None:
        (tmp_path / "korean.txt").write_text("the 한글 fox 한", encoding="utf-8")
        ended = throughtime("eval", run, tmp_path / "korean.txt", "--json")
        assert ended.code == 0
        assert not ended.err
        assert ended.json["unknown"] == 3
        assert ended.json["bits_per_byte"] == pytest.approx(ended.json["bits_per_character"] * 12 / 18)

    def test_eval_reads_cold_windows_and_tells_the_loss_by_position(
        self, throughtime: Call, run: Path, text: Path
    ) -> None:
        flags = ("--cold", 16, "--by-position", "--ngram", 3)
        shown, record = throughtime("eval", run, text, *flags), throughtime("eval", run, text, *flags, "--json").json
        assert record["method"] == "cold windows of 16 tokens"
        assert len(record["by_position"]["nats"]) == 16
        assert sum(record["by_position"]["tokens"]) == record["tokens"]
        assert record["baseline"]["nats_per_token"] < record["nats_per_token"]
        assert "in cold windows of 16 tokens" in shown.out
        assert "9–16" in shown.out
        assert f"{record['baseline']['nats_per_token']:.4f}" in shown.out

    def test_eval_learns_as_it_reads_and_leaves_the_run_alone(self, throughtime: Call, run: Path, text: Path) -> None:
        before = (run / "model.safetensors").read_bytes()
        plain = throughtime("eval", run, text, "--json").json
        flags = ("--dynamic", "rms", "--dynamic-lr", 0.01, "--segment", 5, "--cache", 50, "--cache-sharpness", 2)
        record = throughtime("eval", run, text, *flags, "--json").json
        assert record["nats_per_token"] < plain["nats_per_token"]
        assert "dynamic evaluation (rms, rate 0.01, decay 0.02, segments of 5)" in record["method"]
        assert "neural cache (50 tokens, weight 0.1, sharpness 2)" in record["method"]
        assert "dynamic evaluation (sgd" in throughtime("eval", run, text, "--dynamic", "sgd").out
        assert (run / "model.safetensors").read_bytes() == before

    def test_info_tells_the_model_the_data_and_the_results(self, throughtime: Call, run: Path, text: Path) -> None:
        shown, record = throughtime("info", run), throughtime("info", run, "--json").json
        letters, hidden = record["model"]["vocabulary_size"], 8
        assert letters == len(set(text.read_text())) + 1
        assert record["model"]["parameters"] == 4 * hidden * (letters + hidden + 2) + letters * (hidden + 1)
        assert record["data"]["files"] == [str(text)]
        assert record["results"]["training"]["steps"] == 12
        assert f"{record['model']['parameters']:,} parameters" in shown.out
        assert f"{record['results']['held_out']['perplexity']:,.3f}" in shown.out

    def test_info_of_a_run_without_results_says_how_to_go_on(
        self, throughtime: Call, run: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "results.json").unlink()
        ended = throughtime("info", tmp_path / "run")
        assert ended.code == 0
        assert "train --resume" in " ".join(ended.out.split())


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sequences; tests only read it."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "names.txt").write_text("anna\nbob\ncarla\n" * 40)
    arguments = [
        "train",
        str(folder / "names.txt"),
        "--out",
        str(folder / "run"),
        "--mode",
        "sentence",
        *map(str, SMALL),
    ]
    assert cli.main([*arguments, "--steps", "60", "--lr", "0.03"]) == 0
    return folder / "run"


class TestScore:
    def test_each_line_has_its_log_probability(self, throughtime: Call, names: Path, tmp_path: Path) -> None:
        (tmp_path / "lines.txt").write_text("anna\n\nzzzz\nanna\n")
        ended = throughtime("score", names, tmp_path / "lines.txt")
        assert ended.code == 0
        scores = [float(line) for line in ended.out.splitlines()]
        assert len(scores) == 4
        assert scores[0] == scores[3] > scores[2]
        record = throughtime("score", names, tmp_path / "lines.txt", "--json").json
        assert record["log_probability"] == pytest.approx(sum(scores), abs=1e-3)
        assert record["log_probabilities"] == pytest.approx(scores, abs=1e-4)

    def test_n_best_lists_are_ranked(self, throughtime: Call, names: Path, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("a\t-1\tzbzb\na\t-1\tanna\nb\t0\tbob\nb\t500\tzzz\n")
        ended = throughtime("score", names, tmp_path / "list.txt", "--nbest")
        assert [line.split("\t")[::2] for line in ended.out.splitlines()] == [
            ["a", "anna"], ["a", "zbzb"], ["b", "zzz"], ["b", "bob"],
        ]  # fmt: skip
        best = throughtime("score", names, tmp_path / "list.txt", "--nbest", "--best", "--weight", 1000)
        assert [line.split("\t")[2] for line in best.out.splitlines()] == ["anna", "bob"]
        assert set(throughtime("score", names, tmp_path / "list.txt", "--nbest", "--json").json) == {"a", "b"}

    def test_a_run_of_a_stream_without_line_ends_cant(self, throughtime: Call, run: Path, text: Path) -> None:
        ended = throughtime("score", run, text)
        assert ended.code == errors.BAD_INPUT
        assert "knows no line end" in ended.err

    def test_eval_counts_ends_and_tells_the_perplexity_without_them(
        self, throughtime: Call, names: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "more.txt").write_text("anna\nbob\n")
        record = throughtime("eval", names, tmp_path / "more.txt", "--json").json
        assert tuple(record) == (*EVALUATION, "perplexity_without_eos", "sequences")
        assert (record["tokens"], record["sequences"]) == (9, 2)
        assert "without ends" in throughtime("eval", names, tmp_path / "more.txt").out
        assert "sequences" in throughtime("info", names).out


class TestSample:
    def test_several_samples_of_sequences_are_lines(self, throughtime: Call, names: Path) -> None:
        ended = throughtime("sample", names, "--samples", 5, "--seed", 1, "--length", 20)
        assert ended.code == 0
        assert ended.out.count("\n") == 5
        assert throughtime("sample", names, "--seed", 1, "--length", 20).out == ended.out.splitlines()[0] + "\n"

    def test_samples_of_a_stream_are_set_apart(self, throughtime: Call, run: Path) -> None:
        ended = throughtime("sample", run, "--samples", 2, "--seed", 1, "--length", 9, "--prompt", "the ")
        assert [len(line) for line in ended.out.splitlines()] == [13, 0, 13]

    def test_a_stop_text_ends_it(self, throughtime: Call, run: Path) -> None:
        whole = throughtime("sample", run, "--length", 80, "--seed", 2).out
        stopped = throughtime("sample", run, "--length", 80, "--seed", 2, "--stop", whole[5:7]).out
        assert stopped == whole.partition(whole[5:7])[0] + "\n"

    def test_beams_are_printed_best_first(self, throughtime: Call, names: Path) -> None:
        one = throughtime("sample", names, "--beams", 4, "--prompt", "an")
        three = throughtime("sample", names, "--beams", 4, "--samples", 3, "--prompt", "an")
        lines = [line.split("\t") for line in three.out.splitlines()]
        assert one.code == three.code == 0
        assert next(text for _, text in lines) + "\n" == one.out
        assert len(lines) == 3
        assert all(text.startswith("an") and float(score) < 0 for score, text in lines)

    def test_a_run_says_how_it_wants_to_be_sampled_and_flags_override_it(
        self, throughtime: Call, run: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(run, tmp_path / "run")
        settings = json.loads((run / "generation_config.json").read_text())
        (tmp_path / "run" / "generation_config.json").write_text(json.dumps(settings | {"greedy": True}))
        greedy = throughtime("sample", run, "--greedy", "--length", 30).out
        assert throughtime("sample", tmp_path / "run", "--length", 30).out == greedy
        (tmp_path / "run" / "generation_config.json").write_text(json.dumps(settings | {"top_k": 0}))
        assert "generation_config.json: not what 'sample' can be told" in throughtime("sample", tmp_path / "run").err
        assert throughtime("sample", tmp_path / "run").code == errors.BAD_INPUT

    def test_a_seed_repeats_the_text_after_the_prompt(self, throughtime: Call, run: Path) -> None:
        first = throughtime("sample", run, "--prompt", "the ", "--length", 30, "--seed", 3)
        again = throughtime("sample", run, "--prompt", "the ", "--length", 30, "--seed", 3)
        other = throughtime("sample", run, "--prompt", "the ", "--length", 30, "--seed", 4)
        assert first.code == 0
        assert first.out == again.out != other.out
        assert first.out.startswith("the ")
        assert first.out.endswith("\n")
        assert len(first.out) == 4 + 30 + 1
        assert not first.err

    def test_greedy_needs_no_seed(self, throughtime: Call, run: Path) -> None:
        once, twice = (throughtime("sample", run, "--greedy", "--length", 20).out for _ in range(2))
        assert once == twice

    def test_unknown_characters_of_a_prompt_are_said_once_and_kept(self, throughtime: Call, run: Path) -> None:
        ended = throughtime("sample", run, "--prompt", "한글 한", "--length", 5)
        assert ended.code == 0
        assert ended.out.startswith("한글 한")
        assert ended.err == "not in the run's vocabulary, read as unknown: 한 글\n"

    def test_a_terminal_is_not_commanded_by_what_a_model_writes(
        self, throughtime: Call, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert "\x1b" not in throughtime("sample", run, "--prompt", "\x1b[2J", "--length", 5).out


HUGE = "9" * 23
BAD_INPUT = [
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["--hlep"], "unknown option --hlep; did you mean --help?"),
    (["train", "TEXT"], "--out RUN is missing"),
    (["train", "--out", "NEW"], "no text given"),
    (["train", "TEXT", "--out", "NEW", "--hiden", "3"], "unknown option --hiden; did you mean --hidden?"),
    (["train", "TEXT", "--out", "NEW", "--hidden", "x"], "--hidden x: expected a whole number"),
    (["train", "TEXT", "--out", "NEW", "--hidden", "2.5"], "--hidden 2.5: expected a whole number"),
    (["train", "TEXT", "--out", "NEW", "--lr", "fast"], "--lr fast: expected a number"),
    (["train", "TEXT", "--out", "NEW", "--hidden"], "option '--hidden' requires an argument"),
    (["train", "TEXT", "--out", "NEW", "--hidden", "0"], "--hidden 0"),
    (["train", "TEXT", "--out", "NEW", "--layers", "-1"], "--layers -1"),
    (["train", "TEXT", "--out", "NEW", "--embedding", "-1"], "--embedding -1"),
    (["train", "TEXT", "--out", "NEW", "--dropout", "1"], "--dropout 1"),
    (["train", "TEXT", "--out", "NEW", "--tied"], "--tied"),
    (["train", "TEXT", "--out", "NEW", "--batch", "0"], "--batch 0"),
    (["train", "TEXT", "--out", "NEW", "--lr", "nan"], "--lr nan"),
    (["train", "TEXT", "--out", "NEW", "--clip", "-1"], "--clip"),
    (["train", "TEXT", "--out", "NEW", "--split", "1"], "--split 1"),
    (["train", "TEXT", "--out", "NEW", "--seed", "-1"], "--seed -1: expected a whole number from 0"),
    (["train", "TEXT", "--out", "NEW", "--seed", "9" * 30], "expected a whole number from 0"),
    (
        ["train", "TEXT", "--out", "NEW", "--minutes", "1", "--steps", "2"],
        "exactly one of --minutes, --epochs, --steps",
    ),
    (["train", "TEXT", "--out", "NEW", "--steps", "0"], "--steps 0: expected a number above 0"),
    (["train", "TEXT", "--out", "NEW", "--cell", "lstn"], "unknown cell 'lstn'; did you mean 'lstm'?"),
    (["train", "TEXT", "--out", "NEW", "--level", "chr"], "unknown level 'chr'; did you mean 'char'?"),
    (["train", "TEXT", "--out", "NEW", "--optimizer", "adm"], "unknown optimizer 'adm'; did you mean 'adam'?"),
    (["train", "TEXT", "--out", "NEW", "--device", "gpu9"], "--device gpu9"),
    (["train", "TEXT", "--out", "NEW", "--batch", "9999"], "--batch"),
    (["train", "FOLDER", "--out", "NEW", "--include", "*.tex"], "no files match '*.tex'"),
    (["train", "FOLDER/missing.txt", "--out", "NEW"], "missing.txt: no such file"),
    (["train", "FOLDER/empty.txt", "--out", "NEW"], "empty.txt: the file is empty"),
    (["train", "FOLDER/one.txt", "--out", "NEW"], "one.txt"),
    (["train", "FOLDER/binary.txt", "--out", "NEW"], "NUL byte at position 3"),
    (["train", "FOLDER/latin1.txt", "--out", "NEW"], "byte 0xe9 at position 3 is not UTF-8"),
    (["train", "/dev/null", "--out", "NEW"], "not a regular file"),
    (["train", "TEXT", "--out", "RUN"], "exists and is not empty"),
    (["train", "TEXT", "--out", "TEXT"], "a file of this name exists"),
    (["train", "TEXT", "--out", "/proc/nothing/here"], "can't be written"),
    (["train", "TEXT", "--out", "NEW", "--config", "FOLDER/missing.toml"], "missing.toml: no such file"),
    (["train", "TEXT", "--out", "NEW", "--config", "FOLDER/bad.toml"], "bad.toml: not TOML"),
    (
        ["train", "TEXT", "--out", "NEW", "--config", "FOLDER/unknown.toml"],
        "unknown option 'hiden'; did you mean 'hidden'?",
    ),
    (["train", "TEXT", "--out", "NEW", "--config", "FOLDER/type.toml"], "hidden = 'big': expected a whole number"),
    (["train", "--resume", "NEW"], "no such run"),
    (["train", "--resume", "RUN"], "this run is complete"),
    (["train", "--resume", "RUN", "--lr", "1"], "--lr with --resume is for training longer"),
    (["train", "TEXT", "--resume", "RUN"], "the run's own text and options"),
    (["train", "", "--out", "NEW"], "FILE_OR_FOLDER… is empty: expected the name of a file or folder"),
    (["train", "TEXT", "", "--out", "NEW"], "FILE_OR_FOLDER… is empty"),
    (["train", "TEXT", "--out", ""], "--out is empty: expected the name of a file or folder; is a variable unset?"),
    (["train", "TEXT", "--out="], "--out is empty"),
    (["train", "--resume", ""], "--resume is empty"),
    (["train", "TEXT", "--out", "NEW", "--config", ""], "--config is empty"),
    (["eval", "", "TEXT"], "RUN is empty"),
    (["eval", "RUN", ""], "FILE is empty"),
    (["sample", ""], "RUN is empty"),
    (["sample", "RUN", "--prompt-file", ""], "--prompt-file is empty"),
    (["plot", "RUN", ""], "RUN… is empty"),
    (["compare-gradients", "lstm", ""], "RUN_OR_CELL… is empty"),
    (["gradients", "RUN", "--text", ""], "--text is empty"),
    (["pack", "RUN", ""], "OUT is empty"),
    (["eval", "RUN"], "missing argument"),
    (["eval", "NEW", "TEXT"], "no such run"),
    (["eval", "FOLDER", "TEXT"], "not a run"),
    (["eval", "RUN", "FOLDER/missing.txt"], "missing.txt: no such file"),
    (["eval", "RUN", "FOLDER/empty.txt"], "empty.txt: the file is empty"),
    (["eval", "RUN", "FOLDER/one.txt"], "at least 2"),
    (["eval", "RUN", "FOLDER/latin1.txt"], "byte 0xe9 at position 3 is not UTF-8"),
    (["eval", "RUN", "FOLDER"], "not a regular file"),
    (["eval", "TRUNCATED", "TEXT"], "model.safetensors"),
    (["eval", "ALTERED", "TEXT"], "truncated or altered"),
    (["eval", "RUN", "TEXT", "--cold", "0"], "--cold 0: expected a number of tokens"),
    (["eval", "RUN", "TEXT", "--by-position"], "add --cold W"),
    (["eval", "RUN", "TEXT", "--dynamic", "smg"], "unknown rule of dynamic evaluation 'smg'; did you mean 'sgd'?"),
    (["eval", "RUN", "TEXT", "--dynamic-lr", "1"], "--dynamic-lr is for --dynamic RULE"),
    (["eval", "RUN", "TEXT", "--cache-weight", "0.1"], "--cache-weight is for --cache N"),
    (["eval", "RUN", "TEXT", "--cold", "9", "--cache", "9"], "--cold reads from fresh states"),
    (["eval", "RUN", "TEXT", "--ngram", "0"], "an n-gram of order 0"),
    (["sample", "TRUNCATED"], "model.safetensors"),
    (["sample", "RUN", "--temperature", "0"], "--temperature 0"),
    (["sample", "RUN", "--temperature", "nan"], "--temperature nan"),
    (["sample", "RUN", "--top-k", "0"], "--top-k 0"),
    (["sample", "RUN", "--top-p", "1.5"], "--top-p 1.5"),
    (["sample", "RUN", "--length", "0"], "--length 0"),
    (["sample", "RUN", "--length", "1000000001"], "expected a number of tokens from 1 to 1,000,000,000"),
    (["sample", "RUN", "--length", "10001", "--beams", "2"], "a number of tokens from 1 to 10,000 of a beam search"),
    (["sample", "RUN", "--samples", "0"], "--samples 0"),
    (["sample", "RUN", "--samples", "1000000001"], "expected a whole number from 1 to 1,000,000,000"),
    (["sample", "RUN", "--prompt-file", "FOLDER/missing.txt"], "missing.txt: no such file"),
    (["sample", "RUN", "--prompt-file", "FOLDER/latin1.txt"], "byte 0xe9 at position 3 is not UTF-8"),
    (["sample", "RUN", "--prompt-file", "TEXT", "--prompt", "a"], "--prompt and --prompt-file both give the prompt"),
    (["sample", "RUN", "--prompt", "caf\udce9 "], "--prompt: byte 0xe9 at position 3 is not UTF-8"),
    (["sample", "RUN", "--beams", "2", "--length-penalty", "nan"], "--length-penalty nan: expected a number from -10"),
    (["sample", "RUN", "--min-p", "2"], "--min-p 2"),
    (["sample", "RUN", "--stop", ""], "--stop ''"),
    (["sample", "RUN", "--alphabet", "XYZ"], "--alphabet 'XYZ': no token of the run is written with these"),
    (["sample", "RUN", "--beams", "2", "--alphabet", ""], "--alphabet '': no token"),
    (["sample", "RUN", "--beams", "0"], "expected from 1 to the 0 that --beams finds"),
    (["sample", "RUN", "--beams", "3", "--top-k", "3"], "--beams searches the likeliest text"),
    (["sample", "RUN", "--length-penalty", "3"], "--length-penalty is for beam search"),
    (["score", "RUN", "FOLDER/missing.txt"], "missing.txt: no such file"),
    (["score", "RUN", "TEXT", "--best"], "expected --nbest with them"),
    (["score", "RUN", "TEXT", "--nbest"], "line 1: no tab"),
    (["train", "TEXT", "--out", "NEW", "--mode", "sentense"], "unknown mode 'sentense'; did you mean 'sentence'?"),
    (["train", "TEXT", "--out", "NEW", "--sequence", "word"], "unknown sequence 'word'"),
    (["train", "TEXT", "--out", "NEW", "--mode", "sentence"], "1 sequence in all"),
    (["train", "TEXT", "--out", "NEW", "--vocabulary", "9"], "--vocabulary is for --level word and bpe"),
    (["train", "TEXT", "--out", "NEW", "--level", "bpe", "--vocabulary", "9"], "--vocabulary 9: expected at least 256"),
    (["train", "TEXT", "--out", "NEW", "--min-count", "0"], "--min-count 0"),
    (["sample", "RUN", "--lenght", "3"], "did you mean --length?"),
    (["train", "TEXT", "--out", "NEW", "--hidden", HUGE], ": expected a whole number below 2^63"),
    (["train", "TEXT", "--out", "NEW", "--embedding", HUGE], ": expected a whole number below 2^63"),
    (["train", "TEXT", "--out", "NEW", "--layers", HUGE], ": expected a whole number below 2^63"),
    (["train", "TEXT", "--out", "NEW", "--hidden", "9" * 400], ": expected a whole number below 2^63"),
    (["eval", "RUN", "TEXT", "--ngram", HUGE], "expected from 1 to 20"),
    (["sample", "RUN", "--beams", HUGE], "expected from 1 to 1,000"),
    (["gradients", "--cell", "lstm", "--hidden", HUGE], "needs more than a million GB"),
    (["gradients", "--cell", "lstm", "--layers", HUGE], ": expected a whole number from 1 to 100"),
    (["gradients", "--cell", "lstm", "--hidden", "1", "--lags", "1000000", "--probe", "1000000"], "GB are free; lower"),
    (["gradients", "--cell", "lstm", "--hidden", "0"], "--hidden 0: expected a whole number, at least 1"),
    (["gradients", "--cell", "lstm", "--lags", HUGE], "lower --hidden, --layers, --lags or --probe"),
    (["gradients", "RUN", "--probe", HUGE], "give more text, or lower --lags or --probe"),
    (["compare-gradients", "lstm", "RUN", "--hidden", HUGE], "lstm: 1 layer of 999"),
    (["task", "lag", "--length", "9223372036854775807"], "needs more than a million GB"),
    (["task", "adding", "--hidden", HUGE], "needs more than a million GB"),
    (["task", "adding", "--steps", "0"], "--steps 0: expected a whole number, at least 1"),
    (["train", "TEXT", "--out", "NEW", "--init", "forgett:3"], "did you mean 'forget'?"),
    (["train", "TEXT", "--out", "NEW", "--cell", "gru", "--init", "forget:3"], "is for LSTM, not for GRU"),
    (["train", "TEXT", "--out", "NEW", "--cell", "mlp", "--init", "orthogonal"], "--cell mlp has none"),
    (["info", "NEW"], "no such run"),
    (["info", "RUN", "RUN"], "unexpected extra argument"),
    (["explain", ""], "no letters"),
    (["explain", "y"], "'y' has one letter"),
    (["explain", "aaaa"], "one distinct letter"),
    (["explain", "ybigta", "--hidden", "0"], "--hidden 0"),
    (["explain", "ybigta", "--lr", "0"], "--lr 0"),
    (["explain", "ybigta", "--lr", "1.7e308", "--clip", "0"], "isn't finite"),
    (["explain", "y\nb", "--lrr", "1"], "did you mean --lr?"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").touch()
    (folder / "one.txt").write_text("x")
    (folder / "binary.txt").write_bytes(b"abc\0def" * 50)
    (folder / "latin1.txt").write_bytes(b"caf\xe9 " * 50)
    (folder / "bad.toml").write_text("hidden = = 3")
    (folder / "unknown.toml").write_text("hiden = 3")
    (folder / "type.toml").write_text('hidden = "big"')
    return folder


@pytest.fixture(scope="module")
def damaged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("damaged") / name for name in ("TRUNCATED", "ALTERED")}
    for folder in folders.values():
        shutil.copytree(run, folder)
    weights = (run / "model.safetensors").read_bytes()
    (folders["TRUNCATED"] / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (folders["ALTERED"] / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    return folders


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT, ids=[" ".join(a)[:60] for a, _ in BAD_INPUT])
def test_bad_input_is_one_clear_line_and_nothing_is_lost(
    arguments: list[str],
    said: str,
    throughtime: Call,
    text: Path,
    run: Path,
    bad_files: Path,
    damaged: dict[str, Path],
    tmp_path: Path,
) -> None:
    places = {"TEXT": text, "RUN": run, "NEW": tmp_path / "new", "FOLDER": bad_files, **damaged}

    def placed(word: str) -> str:
        head, slash, tail = word.partition("/")
        return f"{places[head]}{slash}{tail}" if head in places else word

    before = _contents(run), _contents(text.parent), _contents(bad_files)
    ended = throughtime(*map(placed, arguments))
    assert ended.code == errors.BAD_INPUT, ended
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("throughtime")
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not ended.out or arguments[0] == "explain"  # what was worked out before the loss overflowed
    assert (_contents(run), _contents(text.parent), _contents(bad_files)) == before


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(throughtime: Call, run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("abc")
    (tmp_path / "secret.txt").chmod(0)
    ended = throughtime("eval", run, tmp_path / "secret.txt")
    assert (ended.code, ended.err.count("\n")) == (errors.BAD_INPUT, 1)
    assert "secret.txt: can't be read" in ended.err


def test_a_loss_that_is_no_number_stops_with_the_step(throughtime: Call, text: Path, tmp_path: Path) -> None:
    ended = throughtime("train", text, "--out", tmp_path / "run", *SMALL, "--lr", 1e30, "--clip", 0)
    assert ended.code == errors.BAD_INPUT
    assert "at step" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


class TestProcess:
    def test_a_reader_that_goes_away_is_no_error(self, run: Path) -> None:
        command = f"{sys.executable} -m throughtime sample {run} --length 20000 | head -c 10"
        ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
        assert len(ended.stdout) == 10
        assert ended.stderr == ""

    def test_the_program_ends_with_the_exit_code_and_without_a_traceback(self) -> None:
        ended = program("info", "no-such-run")
        assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)

    def test_explain_survives_a_terminal_that_knows_only_ascii(self) -> None:
        ended = program("explain", "ybigta", env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
        assert ended.returncode == 0
        assert "It spells ybigta" in ended.stdout


def test_the_options_that_info_tells_are_taken_by_train(throughtime: Call, text: Path, tmp_path: Path) -> None:
    flags = ("--no-split-punctuation", "--include", "*.a b", "--clip-value", 3, "--eval-every", 4, "--no-tensorboard")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "x.a b").write_text(text.read_text())
    assert throughtime("train", folder, "--out", tmp_path / "run", *SMALL, *flags, "--level", "word").code == 0
    rows = throughtime("info", tmp_path / "run").out.splitlines()
    start = next(number for number, row in enumerate(rows) if row.lstrip().startswith("options "))
    told = [rows[start].replace("options", "", 1)]
    for row in rows[start + 1 :]:
        if row[:3].strip():
            break
        told.append(row)
    train = cli.typer.main.get_command(cli.app).commands["train"]
    parsed = train.make_context("train", [str(folder), "--out", "again", *shlex.split(" ".join(told))]).params
    options = throughtime("info", tmp_path / "run", "--json").json["options"]
    for name in ("split_punctuation", "include", "clip_value", "tensorboard", "lr", "batch"):
        assert parsed[name] == options[name]


@pytest.mark.parametrize("columns", [8, 20, 30, 41])
def test_a_narrow_console_loses_nothing_of_what_info_tells(
    throughtime: Call, run: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    wide = throughtime("info", run).out
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = throughtime("info", run).out
    assert "".join(narrow.split()) == "".join(wide.split())
    assert max(map(len, narrow.splitlines())) <= columns


def test_info_breaks_no_line_between_a_flag_and_its_value(throughtime: Call, run: Path) -> None:
    lines = throughtime("info", run).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("--init default" in line for line in lines)
    assert not [line for line in lines if re.search(r"--(init|bptt|lr-decay|weight-decay|dtype)\s*$", line)]

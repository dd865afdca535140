"""`throughtime quantize`, and what else takes a precision."""

import pytest

from throughtime.kernels import native

pytestmark = pytest.mark.skipif(native.module is None, reason="streams need the kernels")


def test_quantize_tells_what_narrow_weights_cost(throughtime, run):
    ended = throughtime("quantize", run)
    assert ended.code == 0
    words = ended.out.split()  # which a narrow terminal wraps
    places = [words.index(name) for name in ("float32", "bfloat16", "int8")]
    assert places == sorted(places)
    assert ended.out.count("%)") == 2
    assert words.count("characters/s") == 3
    assert ended.out.endswith("--precision int8\n")


def test_quantize_answers_a_script_too_and_reads_a_file(throughtime, run, tmp_path):
    text = tmp_path / "unseen.txt"
    text.write_text("to be or not to be\n" * 30)
    ended = throughtime("quantize", run, text, "--json")
    assert ended.code == 0
    exact, *narrow = ended.json["precisions"]
    assert (exact["precision"], exact["lost"]) == ("float32", 0.0)
    for each in narrow:
        assert abs(each["lost"]) < 0.05
        assert each["weights"] < exact["weights"]
        assert each["tokens_a_second"] > 0
        assert each["evaluation"]["method"].endswith(each["precision"])


def test_eval_and_sample_take_a_precision(throughtime, run, tmp_path):
    text = tmp_path / "unseen.txt"
    text.write_text("to be or not to be\n" * 30)
    exact, narrow = (throughtime("eval", run, text, "--json", "--precision", name).json for name in ("float32", "int8"))
    assert exact["nats_per_token"] != narrow["nats_per_token"]
    assert exact["nats_per_token"] == pytest.approx(narrow["nats_per_token"], rel=0.02)
    first, second = (throughtime("sample", run, "--length", 50, "--seed", 1, "--precision", "int8") for _ in range(2))
    assert first.code == 0
    assert first.out == second.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sample", "--precision", "int9"), "unknown precision 'int9'"),
        (("eval", "--precision", "int9"), "unknown precision 'int9'"),
        (("eval", "--precision", "int8", "--cache", "5"), "--precision int8"),
        (("sample", "--precision", "int8", "--beams", "2"), "--precision int8"),
    ],
)
def test_what_cannot_be_is_refused(throughtime, run, tmp_path, arguments, said):
    text = tmp_path / "unseen.txt"
    text.write_text("to be or not to be\n" * 30)
    command, *options = arguments
    files = [text] if command == "eval" else []
    ended = throughtime(command, run, *files, *options)
    assert ended.code == 2
    assert said in ended.err

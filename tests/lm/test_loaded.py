import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import throughtime
from throughtime.errors import InputError
from throughtime.lm import TrainingOptions, open_run, token_names, train
from throughtime.training.checkpoint import save_json

TEXT = "the cat sees a ball, and “the” ball sees naïve 나무.\nno one sees it\n" * 40
SMALL = {"steps": 6, "hidden": 12, "batch": 3, "bptt": 12}
LEVELS, MODES = ("char", "byte", "word", "bpe"), ("stream", "sentence")
KINDS = {
    **{f"{level}-{mode}": {"level": level, "mode": mode} for level in LEVELS for mode in MODES},
    "files": {"mode": "sentence", "sequence": "file"},
    "mlp": {"cell": "mlp", "window": 4, "embedding": 6},
    "tied": {"level": "word", "embedding": 6, "tied": True, "layers": 2, "cell": "gru"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    texts = [folder / "a.txt", folder / "b.txt", folder / "c.txt"]
    for path in texts:
        path.write_text(TEXT, encoding="utf-8")
    for name, options in KINDS.items():
        train(texts, folder / name, TrainingOptions(**SMALL, **options))
    return folder


@pytest.fixture(params=KINDS)
def run(request, folders):
    return throughtime.load(folders / request.param)


def test_every_kind_of_run_writes_tells_and_scores(run):
    text = run.generate("the cat", length=15, seed=1)
    assert text.startswith("the cat")
    assert text == run.generate("the cat", length=15, seed=1) == "".join(run.stream("the cat", length=15, seed=1))
    assert len({*run.samples("the cat", 3, length=15, seed=1, temperature=3.0), text}) >= 3
    found = run.probabilities("the cat")
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert set(found) == set(token_names(run.tokenizer))
    scores = run.score(["the cat", "나무 sees", ""])
    assert scores.shape == (3,)
    assert (scores < 0).all()


def test_a_probability_is_that_of_the_model_and_what_is_sampled(run):
    """The likeliest of the known tokens is what --greedy writes."""
    found = run.probabilities("the cat sees")
    names = token_names(run.tokenizer)
    ids = run.tokenizer.encode("the cat sees").tolist()
    first = [] if run.tokenizer.eos_id is None else [run.tokenizer.eos_id]
    with torch.no_grad():
        logits, _ = run.model(torch.tensor([*first, *ids])[:, None])
    p = logits[-1, 0].double().softmax(0).numpy()
    assert found[names[int(p.argmax())]] >= p.max() - 1e-12
    if len(set(names)) == len(names):
        assert [found[name] for name in names] == pytest.approx(p.tolist())
        known = [name for name in found if name not in ("<unk>", "<eos>")]
        if next(iter(found)) == known[0] and "\\x" not in known[0]:
            assert run.generate("the cat sees", length=1, greedy=True).endswith(known[0])


@pytest.mark.parametrize("kind", ["word-stream", "bpe-stream"])
def test_a_space_at_a_prompts_end_is_the_next_tokens(folders, kind):
    """What may follow "the cat " is what may follow "the cat" with a space before it."""
    run = throughtime.load(folders / kind)
    found, before = run.probabilities("the cat "), run.probabilities("the cat")
    assert sum(found.values()) == pytest.approx(1, abs=1e-9)
    spaced = " sees" if kind == "bpe-stream" else "sees"
    least, other = ("sees", "ball") if kind == "word-stream" else ("sees", "a")
    ratio = before[spaced] / before[spaced.replace("sees", other)]
    assert found[least] / found[other] == pytest.approx(ratio)
    assert found.get("\n", 0.0) == 0


def test_a_line_scores_the_same_alone_among_others_and_with_its_end(run):
    alone, among = run.score("the cat"), run.score(["no one", "the cat\n"])
    assert run.score("the cat\r\n") == alone
    assert isinstance(alone, float)
    assert among[1] == pytest.approx(alone, rel=1e-5)
    assert len(run.score([])) == 0


def test_a_score_is_the_sum_of_its_tokens_probabilities(folders):
    run = throughtime.load(folders / "char-sentence")
    text, total = "sees", 0.0
    for place, letter in enumerate([*text, "<eos>"]):
        total += np.log(run.probabilities(text[:place])[letter])
    assert run.score(text) == pytest.approx(total, rel=1e-5)


def test_bytes_of_any_script_are_scored(folders):
    run = throughtime.load(folders / "byte-sentence")
    text, total, names = "나", 0.0, token_names(run.tokenizer)
    ids = [run.tokenizer.eos_id, *text.encode(), run.tokenizer.eos_id]
    with torch.no_grad():
        logits, _ = run.model(torch.tensor(ids)[:, None])
    total = sum(float(logits[t, 0].log_softmax(0)[ids[t + 1]]) for t in range(len(ids) - 1))
    assert run.score(text) == pytest.approx(total, rel=1e-5)
    assert names[0xEB] == "\\xeb"
    assert names[ord("a")] == "a"
    assert len(set(names)) == 257


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.generate("a", temprature=1.0), "option.*temprature.*temperature"),
        (lambda run: run.generate("a", temperature=0.0), "temperature 0.0"),
        (lambda run: run.stream("a", length=0), "length 0"),
        (lambda run: run.generate("a", length=1.5), "length = 1[.]5: expected a whole number"),
        (lambda run: run.generate("a", seed=-1), "seed = -1: expected a whole number, at least 0"),
        (lambda run: run.samples("a", 2, seed=0.5), "seed = 0[.]5: expected a whole number, at least 0"),
        (lambda run: run.generate("a", temperature="x"), "temperature = 'x': expected a number"),
        (lambda run: run.generate("a", top_k=1.5), "top_k = 1[.]5: expected a whole number"),
        (lambda run: run.generate("a", stop=""), "stop"),
        (lambda run: run.samples("a", 0), "count = 0"),
        (lambda run: run.samples("a", "2"), "count = '2': expected a whole number"),
        (lambda run: run.generate(3), "prompt = 3: expected text"),
        (lambda run: run.stream(None), "prompt = None: expected text"),
        (lambda run: run.samples(["a"]), r"prompt = \['a'\]: expected text"),
        (lambda run: run.probabilities(b"a"), "prompt = b'a': expected text"),
        (lambda run: run.generate("a", stop=5), "stop = 5: expected a text, or several"),
        (lambda run: run.generate("a", stop=["b", None]), r"stop\[1\] = None: expected text"),
        (lambda run: run.generate("a", alphabet=5), "alphabet = 5: expected text"),
        (lambda run: run.score(5), "lines = 5: expected a text, or several"),
        (lambda run: run.score(["a", "b\nc"]), r"lines\[1\] holds a line end"),
        (lambda run: run.score(["a", float("nan")]), r"lines\[1\] = nan: expected text"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(folders, call, message):
    with pytest.raises(InputError, match=message) as refused:
        call(throughtime.load(folders / "char-stream"))
    assert "\n" not in str(refused.value)


def test_stop_is_a_text_or_several(folders):
    run = throughtime.load(folders / "char-stream")
    whole = run.generate("the", length=60, seed=2)
    end = whole[20]
    cut = run.generate("the", length=60, seed=2, stop=end)
    assert cut == run.generate("the", length=60, seed=2, stop=[end])
    assert whole.startswith(cut)
    assert end not in cut[3:]


def test_how_the_run_itself_samples_holds_unless_told_otherwise(folders, tmp_path):
    shutil.copytree(folders / "char-stream", tmp_path / "run")
    opened = open_run(tmp_path / "run")
    model = opened.load_model()
    save_json(tmp_path / "run" / "generation_config.json", opened.generation | {"greedy": True})
    opened.save_model(model)  # which vouches for the file
    run = throughtime.load(tmp_path / "run")
    assert run.generate("the", length=20, seed=1) == run.generate("the", length=20, seed=2)
    assert run.generate("the", length=20, seed=1, greedy=False) != run.generate("the", length=20, seed=2, greedy=False)


def test_the_repr_says_what_it_is(run):
    text = repr(run)
    assert "\n" not in text
    assert str(run.run.folder) in text
    for part in (
        run.model.config.cell.upper(),
        f"{run.model.parameter_count:,} parameters",
        run.tokenizer.level,
        "held out",
    ):
        assert part in text


def test_the_model_is_torchs(run):
    assert isinstance(run.model, torch.nn.Module)
    assert not run.model.training
    assert run.options["hidden"] == 12
    assert run.results["training"]["steps"] == 6


def test_the_language_model_is_imported_only_by_who_asks_for_it():
    code = (
        "import sys, throughtime; assert 'throughtime.lm' not in sys.modules; "
        "assert 'load' in dir(throughtime); throughtime.load; assert 'throughtime.lm' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="no such run"):
        throughtime.load(tmp_path / "nothing")
    with pytest.raises(AttributeError, match="has no attribute 'loads'"):
        throughtime.loads  # noqa: B018

import json

import pytest


@pytest.fixture
def packed(throughtime, run, tmp_path):
    assert throughtime("pack", run, tmp_path / "shared").code == 0
    return tmp_path / "shared"


def test_pack_lists_what_it_wrote(throughtime, run, tmp_path):
    ended = throughtime("pack", run, tmp_path / "a")
    assert ended.code == 0
    assert "model.safetensors" in ended.out
    assert "vocabulary" in ended.err
    ended = throughtime("pack", run, tmp_path / "b", "--json")
    assert ended.json["files"] == {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir()}


def test_what_needs_no_text_of_its_own_works_with_a_pack(throughtime, run, packed, text):
    for command in (
        ["sample", "--seed", 1, "--length", 20],
        ["eval", text, "--json"],
        ["eval", text, "--dynamic", "sgd"],
    ):
        ours, theirs = (throughtime(command[0], folder, *command[1:]) for folder in (packed, run))
        assert ours.code == 0
        assert ours.out.replace(str(packed), "RUN").split() == theirs.out.replace(str(run), "RUN").split()
    assert throughtime("gradients", packed, "--text", text, "--lags", 10, "--probe", 4).code == 0


def test_info_tells_what_a_pack_holds(throughtime, run, packed):
    shown = throughtime("info", packed)
    assert shown.code == 0
    assert "packed to be shared" in shown.out
    assert "format 1" in " ".join(shown.out.split())
    ours, theirs = throughtime("info", packed, "--json").json, throughtime("info", run, "--json").json
    assert (ours["packed"], theirs["packed"]) == (True, False)
    assert ours["versions"] == theirs["versions"]
    assert ours["results"] == theirs["results"]
    assert ours["data"] == {name: theirs["data"][name] for name in ("level", "train_tokens", "held_out_tokens")}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "RUN", "TEXT", "--ngram", 3], "holds no text"),
        (["eval", "RUN", "TEXT", "--dynamic", "rms"], "holds no text"),
        (["eval", "RUN", "TEXT", "--last"], "no last weights"),
        (["sample", "RUN", "--last"], "no last weights"),
        (["gradients", "RUN"], "--text FILE"),
        (["plot", "RUN"], "without the curve of its loss"),
        (["train", "--resume", "RUN"], "no checkpoint"),
        (["pack", "RUN", "RUN"], "no empty folder"),
    ],
)
def test_what_needs_more_is_refused_in_a_line(throughtime, packed, text, command, message):
    words = [{"RUN": packed, "TEXT": text}.get(word, word) for word in command]
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    ended = throughtime(*words)
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


def test_a_newer_format_is_refused_by_every_command(throughtime, packed, text):
    config = json.loads((packed / "config.json").read_text())
    config["versions"] |= {"format": config["versions"]["format"] + 1, "throughtime": "9.0"}
    (packed / "config.json").write_text(json.dumps(config))
    for command in (["info", packed], ["sample", packed], ["eval", packed, text], ["score", packed, text], ["plot", packed],
                    ["gradients", packed], ["pack", packed, packed / "x"], ["train", "--resume", packed]):  # fmt: skip
        ended = throughtime(*command)
        assert ended.code == 2
        assert "pip install --upgrade throughtime" in ended.err

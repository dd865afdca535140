"""Text that nobody expects: each works, or is refused in one line that says why."""

import math

import numpy as np
import pytest

import throughtime.lm.memory as memory
from throughtime import InputError
from throughtime.lm import TrainingOptions, evaluate, generate, open_run, train
from throughtime.lm.corpus import read_tokens

SMALL = {"hidden": 8, "batch": 4, "bptt": 16, "steps": 2}
LEVELS = ["char", "byte", "word", "bpe"]

TEXTS = {
    "one line": b"a line that has no end, " * 300,
    "one word": b"ab" * 3000,
    "one distinct character": b"a" * 6000,
    "line ends alone": b"\n" * 6000,
    "carriage returns": b"one line\r\nand another\r\n" * 200,
    "a byte-order mark": b"\xef\xbb\xbf" + b"text, more text\n" * 300,
    "right to left": "\u202eשלום עולם \u202cمرحبا بالعالم\n".encode() * 150,
    "combining marks": "e\u0301\u0302\u0303 नमस्ते ก็ x\u0338\n".encode() * 150,
    "jamo": "한글 ᄒᆞᆫ글 ㅎㅏㄴ ᄀ\n".encode() * 150,
    "beyond the basic plane": "𝄞 👩‍👩‍👧 🇰🇷 𐍈\n".encode() * 150,
    "control characters": bytes(range(1, 32)) * 200,
    "noncharacters": "\uffff\ufdd0\U0010ffff ".encode() * 600,
}


SINGLE = ("one word", "one distinct character", "line ends alone")  # a word, or a few bpe tokens: nothing to learn from
REFUSED = {("word", name): "1 token in all; too little to train on" for name in SINGLE} | {
    ("bpe", name): r"tokens to train on, but .* needs at least 65|tokens in all; too little" for name in SINGLE
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", TEXTS)
def test_it_trains_and_is_read_back(tmp_path, name, level):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXTS[name])
    options = TrainingOptions(**SMALL, level=level, vocabulary=300 if level == "bpe" else None)
    if (level, name) in REFUSED:
        with pytest.raises(InputError, match=REFUSED[level, name]):
            train([path], tmp_path / "run", options)
        return
    summary = train([path], tmp_path / "run", options)
    assert math.isfinite(summary.evaluation.nats_per_token)
    run = open_run(tmp_path / "run")
    corpus = run.corpus()
    text = TEXTS[name].removeprefix(b"" if level == "byte" else b"\xef\xbb\xbf").decode()
    back = run.tokenizer.decode(np.concatenate([corpus.train, corpus.held_out]))
    if level == "word":  # the space that a text ends with occurs once, so it is a rare word
        back = back.removesuffix("<unk>")
    assert back == text
    again = evaluate(run.load_model(), read_tokens(path, run.tokenizer))
    assert math.isfinite(again.nats_per_token)
    "".join(generate(run.load_model(), run.tokenizer, "a\ud800한\0", 20, seed=1)).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("level", ["char", "word", "bpe"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text \0 text " * 100, "NUL byte at position 5: not a text file; train with --level byte"),
        (b"text \xed\xa0\x80 text " * 100, "byte 0xed at position 5 is not UTF-8"),
        ("text ".encode("utf-16-le") * 100, "text in UTF-16-LE, not UTF-8 text; .*: iconv -f UTF-16-LE -t UTF-8"),
        (b"caf\xe9 " * 100, "byte 0xe9 at position 3 is not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, level, content, message):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        train([path], tmp_path / "run", TrainingOptions(**SMALL, level=level))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert train([path], tmp_path / "bytes", TrainingOptions(**SMALL, level="byte")).steps == 2


def test_many_distinct_characters_train_if_they_fit_and_are_refused_if_not(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, range(0x20000, 0x20000 + 20_000))), encoding="utf-8")
    assert train([path], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 1})).evaluation.unknown == 0
    monkeypatch.setattr(memory, "free_bytes", lambda: 10_000_000)
    with pytest.raises(
        InputError, match=r"a vocabulary of 20,001 with --hidden 8, .* needs about 0\.0 GB|--level byte"
    ):
        train([path], tmp_path / "other", TrainingOptions(**SMALL))
    with pytest.raises(InputError, match="lower --hidden, --batch or --bptt, or use --level byte or bpe"):
        train([path], tmp_path / "other", TrainingOptions(**SMALL))
    assert not (tmp_path / "other").exists()


def test_the_memory_that_training_takes_is_counted():
    from throughtime.lm import LanguageModel, ModelConfig

    config = ModelConfig(vocabulary_size=1000, hidden_size=16)
    weights = LanguageModel(config).parameter_count
    assert memory.bytes_to_train(config, batch=2, window=3) == 16 * weights + 12 * 6 * 1000
    many = memory.bytes_to_train(config, batch=2000, window=300)  # of so many logits a part is held at a time
    assert 16 * weights < many < 16 * weights + 12 * 5_000_000
    assert memory.free_bytes() is None or memory.free_bytes() > 0


def test_one_long_line_is_no_set_of_sequences_but_a_stream(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXTS["one line"])
    with pytest.raises(InputError, match=r"1 sequence in all; .* --mode stream"):
        train([path], tmp_path / "run", TrainingOptions(**SMALL, mode="sentence"))


def test_sequences_longer_than_a_window_keep_their_state(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXTS["one line"] + b"\n" + b"short\n" * 9)
    summary = train([path], tmp_path / "run", TrainingOptions(**SMALL | {"steps": 300}, mode="sentence"))
    assert math.isfinite(summary.evaluation.nats_per_token)

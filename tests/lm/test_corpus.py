"""Files become tokens, in one pass and whatever their size; what can't be text is named with its place."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import throughtime.lm.reading as reading
from throughtime import InputError
from throughtime.lm import ByteTokenizer, CharTokenizer, Tokenization, build_corpus, open_corpus
from throughtime.lm.corpus import read_tokens
from throughtime.lm.stored_tokens import StoredTokens

TEXT = "안녕하세요, world! 𝄞 e\u0301\r\n" * 20


def tokens_of(corpus) -> np.ndarray:
    return np.concatenate([corpus.train, corpus.held_out])


@pytest.mark.parametrize("level", ["char", "byte"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_a_file_is_read_whole_however_it_is_cut(tmp_path, monkeypatch, level, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "data", level)
    assert corpus.tokenizer.decode(tokens_of(corpus).tolist()) == TEXT
    assert abs(len(corpus.train) - 0.9 * len(tokens_of(corpus))) <= 1
    assert corpus.held_out_bytes == len(
        corpus.tokenizer.decode(corpus.held_out.tolist()).encode("utf-8", "replace")
    ) or (level == "byte")
    assert isinstance(corpus.train, StoredTokens)


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=4, max_size=50)
)
def test_any_text_comes_back(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_bytes(text.encode())
    corpus = build_corpus([folder / "a.txt"], folder / "data")
    assert corpus.tokenizer.decode(tokens_of(corpus).tolist()) == text


def test_ids_widen_as_the_vocabulary_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 64)
    text = "".join(chr(0x4E00 + i) for i in range(300)) + "".join(chr(0x10000 + i) for i in range(70_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "data")
    assert corpus.train.dtype == np.uint32
    assert corpus.tokenizer.vocabulary_size == 70_301
    assert corpus.tokenizer.decode(tokens_of(corpus).tolist()) == text


def test_folders_are_read_in_order_and_what_is_no_text_is_counted(tmp_path):
    text = tmp_path / "text"
    (text / "b").mkdir(parents=True)
    (text / ".hidden").mkdir()
    (text / "b" / "two.py").write_text("second" * 5)
    (text / "a.py").write_text("first" * 5)
    (text / "c.txt").write_text("other" * 5)
    (text / "latin.py").write_bytes(b"caf\xe9 ")
    (text / "binary.py").write_bytes(b"a\0b")
    (text / "empty.py").write_bytes(b"")
    (text / ".hidden" / "no.py").write_text("never")
    corpus = build_corpus([text], tmp_path / "data", include="*.py")
    assert corpus.tokenizer.decode(tokens_of(corpus).tolist()) == "first" * 5 + "second" * 5
    assert corpus.left_out == [
        (
            str(text / "binary.py"),
            "no text",
            "NUL byte at position 1: not a text file; train with --level byte for binary files",
        ),
        (
            *(str(text / "latin.py"), "no text"),
            "byte 0xe9 at position 3 is not UTF-8; convert it to UTF-8, or train with --level byte for other encodings",
        ),
    ]
    assert open_corpus(tmp_path / "data").left_out == corpus.left_out


def test_a_skipped_file_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 4)
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"good until here\xff")
    (folder / "b.txt").write_bytes(b"second")
    corpus = build_corpus([folder], tmp_path / "data")
    assert corpus.tokenizer.decode(tokens_of(corpus).tolist()) == "second"
    assert [left_out.path for left_out in corpus.left_out] == [str(folder / "a.txt")]


@pytest.mark.parametrize("again", ["named", "folder", "folder first", "link", "hard link"])
def test_a_file_that_is_met_again_is_read_once(tmp_path, again):
    folder = tmp_path / "text"
    folder.mkdir()
    path, other = folder / "a.txt", folder / "b.txt"
    path.write_text("first" * 9)
    given = {"named": [path, path], "folder": [path, folder], "folder first": [folder, path]}.get(again, [folder])
    if again.endswith("link"):
        (os.symlink if again == "link" else os.link)(path, other)
    corpus = build_corpus(given, tmp_path / "data")
    assert corpus.tokenizer.decode(tokens_of(corpus)) == "first" * 9
    second = other if again.endswith("link") else path
    assert corpus.left_out == [(str(second), "again", f"the same file as {path}")]


def test_a_file_that_is_named_must_be_right_although_its_folder_came_first(tmp_path):
    (tmp_path / "text").mkdir()
    path = tmp_path / "text" / "latin.txt"
    path.write_bytes(b"caf\xe9 " * 9)
    with pytest.raises(InputError, match=r"latin\.txt: byte 0xe9 at position 3 is not UTF-8"):
        build_corpus([tmp_path / "text", path], tmp_path / "data")


def test_runs_and_linked_folders_in_a_folder_are_passed_over(tmp_path):
    text = tmp_path / "text"
    for name, files in {
        "run": ["config.json", "tokenizer.json", "metrics.jsonl", "data/corpus.json"],
        "deep/encoded/data": ["corpus.json", "tokens.bin"],
        "killed/data": [".tokens.bin.0123.new"],
        "out": ["data/half.json"],
        "config": ["config.json", "a.txt"],
    }.items():
        for file in files:
            (text / name / file).parent.mkdir(parents=True, exist_ok=True)
            (text / name / file).write_text("of a run" if name != "config" else file * 9)
    (text / "linked").symlink_to(text / "config")
    corpus = build_corpus([text], tmp_path / "data", out=text / "out")
    assert corpus.tokenizer.decode(tokens_of(corpus)) == "a.txt" * 9 + "config.json" * 9
    runs = ("deep/encoded/data", "run")
    assert sorted((path, kind) for path, kind, _ in corpus.left_out) == sorted(
        [(str(text / run), "run") for run in runs] + [(str(text / "linked"), "link")]
    )
    for run in ("run", "deep/encoded/data"):
        with pytest.raises(InputError, match="a run, not text; expected a folder of text"):
            build_corpus([text / run], tmp_path / "other")
    with pytest.raises(InputError, match=r"no files match '\*' in this folder"):
        build_corpus([text / "killed"], tmp_path / "other")


def test_unchanged_files_are_not_encoded_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert not build_corpus([path], tmp_path / "data").reused
    assert build_corpus([path], tmp_path / "data").reused
    assert not build_corpus([path], tmp_path / "data", split=0.5).reused
    assert not build_corpus([path], tmp_path / "data", "byte").reused
    path.write_text(TEXT + "more")
    corpus = build_corpus([path], tmp_path / "data", "byte")
    assert not corpus.reused
    assert corpus.tokenizer.decode(tokens_of(corpus).tolist()).endswith("more")


def test_progress_reaches_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 10)
    (tmp_path / "a.txt").write_bytes(b"x" * 25)
    (tmp_path / "b.txt").write_bytes(b"y" * 5)
    seen = []
    build_corpus([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "data", on_progress=lambda *p: seen.append(p))
    assert seen[-1] == (30, 30)
    assert seen == sorted(seen)


BAD = {
    "missing": (None, "no such file or folder"),
    "empty": (b"", "the file is empty; expected text"),
    "one character": (b"a", "1 token in all; too little"),
    "nul": (b"text\0more", "NUL byte at position 4: not a text file; train with --level byte"),
    "nul after a wide character": ("한글\0".encode(), "NUL byte at position 6"),
    "latin-1": (b"caf\xe9 au lait", "byte 0xe9 at position 3 is not UTF-8"),
    "latin-1 after a mark": (b"\xef\xbb\xbfcaf\xe9 ", "byte 0xe9 at position 6 is not UTF-8"),
    "utf-16": ("text".encode("utf-16"), "text in UTF-16, not UTF-8 text; convert it, .* iconv -f UTF-16 -t UTF-8"),
    "gzip": (gzip.compress(b"text " * 99), "a.txt: gzip-compressed, not UTF-8 text; decompress it first"),
    "surrogate": (b"abc\xed\xa0\x80", "byte 0xed at position 3 is not UTF-8"),
    "cut off": ("text 한".encode()[:-1], "ends in the middle of a character, at byte 5"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("chunk", [3, 1000])
def test_what_cant_be_text_is_named_with_its_place(tmp_path, monkeypatch, case, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    content, message = BAD[case]
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        build_corpus([path], tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert "a.txt" in str(caught.value)


def test_any_bytes_will_do_at_level_byte(tmp_path):
    data = bytes(range(256)) * 2
    (tmp_path / "a.bin").write_bytes(data)
    corpus = build_corpus([tmp_path / "a.bin"], tmp_path / "data", "byte")
    assert tokens_of(corpus).astype(np.uint8).tobytes() == data


def test_a_byte_order_mark_is_dropped_and_line_ends_stay(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "data")
    assert corpus.tokenizer.decode(tokens_of(corpus).tolist()) == "one\r\ntwo\n"


def test_other_bad_arguments(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "nothing").mkdir()
    for arguments, options, message in [
        ([[]], {}, "no text was given"),
        ([[tmp_path / "a.txt"]], {"how": "chars"}, "unknown level 'chars'; did you mean 'char'"),
        ([[tmp_path / "a.txt"]], {"split": 1.0}, "--split 1.0: expected"),
        ([[tmp_path / "nothing"]], {}, r"no files match '\*' in this folder"),
        ([["/dev/null"]], {}, "not a regular file"),
        ([[tmp_path / "a.txt", ""]], {}, "an empty name was given for a file or folder"),
        ([[tmp_path]], {"include": "/*.txt"}, r"--include '/\*.txt': expected a pattern for names"),
        ([[tmp_path]], {"include": "**.txt"}, r"--include '\*\*.txt': expected a pattern for names"),
    ]:
        with pytest.raises(InputError, match=message):
            build_corpus(*arguments, tmp_path / "data", **options)
    (tmp_path / "only.txt").write_bytes(b"\xff\xff")
    (tmp_path / "binaries").mkdir()
    (tmp_path / "only.txt").rename(tmp_path / "binaries" / "only.txt")
    with pytest.raises(InputError, match=r"none of 1 files is UTF-8 text; .* The first is .*only\.txt: byte 0xff at"):
        build_corpus([tmp_path / "binaries"], tmp_path / "data")


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(InputError, match=r"a\.txt/data: can't write the encoded text there: Not a directory"):
        build_corpus([tmp_path / "a.txt"], tmp_path / "a.txt" / "data")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is full")
def test_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT * 10_000)
    with Path("/dev/full").open("r+b", buffering=0) as device:
        monkeypatch.setattr("throughtime.lm.encoding.create_beside", lambda path: (path, device))
        with pytest.raises(InputError, match=r"can't write the encoded text there: No space left on device"):
            build_corpus([tmp_path / "a.txt"], tmp_path / "data")


def test_a_damaged_encoding_is_refused_when_opened_and_made_anew_when_built(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    build_corpus([tmp_path / "a.txt"], tmp_path / "data")
    tokens = tmp_path / "data" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"tokens\.bin: \d+ bytes, expected"):
        open_corpus(tmp_path / "data")
    assert not build_corpus([tmp_path / "a.txt"], tmp_path / "data").reused
    (tmp_path / "data" / "corpus.json").write_text("{}")
    with pytest.raises(InputError, match=r"corpus\.json: truncated or altered"):
        open_corpus(tmp_path / "data")


def test_reading_a_file_with_a_tokenizer_that_exists(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("cab한")
    assert read_tokens(path, CharTokenizer("abc")).tolist() == [3, 1, 2, 0]
    assert read_tokens(path, ByteTokenizer()).tolist() == list("cab한".encode())
    path.write_text("a")
    with pytest.raises(InputError, match="holds 1 tokens; at least 2 are needed"):
        read_tokens(path, CharTokenizer("abc"))


@pytest.mark.parametrize("sequences", [None, "line", "file"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_several_processes_give_the_ids_that_one_gives(tmp_path, monkeypatch, sequences, spoilt):
    """Also where a file in the middle proves to be no text after some of its pieces were cut."""
    drawn = np.random.default_rng(0)
    words = [
        "a",
        "be",
        "see",
        "sea",
        "don't",
        "<unk>",
        "well-known",
        "(so)",
        '"quoted".',
        "이야기",
        "\n",
        "\n\n",
        "  ",
        "e\u0301",
    ]
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        text = " ".join(words[k] + (str(k) if number == k else "") for k in drawn.integers(0, len(words), 3000))
        (texts / f"{number}.txt").write_text(text, encoding="utf-8")
    if spoilt:
        (texts / "2.txt").write_bytes(("only here stands this. " * 200).encode() + b"\xe9 not UTF-8")
    monkeypatch.setattr("throughtime.lm.reading.CHUNK", 1000)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    found = []
    for least in (1 << 60, 0):
        monkeypatch.setattr("throughtime.lm.encoding._WORTH_PROCESSES", least)
        seen: list[int] = []
        how = Tokenization("word", sequences)
        corpus = build_corpus(
            [texts], tmp_path / f"data{least}", how, on_progress=lambda done, total, seen=seen: seen.append(done)
        )
        assert seen == sorted(seen)
        assert len(corpus.left_out) == int(spoilt)
        found.append(((tmp_path / f"data{least}" / "tokens.bin").read_bytes(), corpus.tokenizer.to_json()))
    assert found[0] == found[1]
    assert len(found[0][0]) > 5000


def test_an_error_in_one_of_several_processes_is_told_as_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr("throughtime.lm.encoding._WORTH_PROCESSES", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    path = tmp_path / "text.txt"
    path.write_bytes(b"some words " * 100 + b"\xe9")
    with pytest.raises(InputError, match="the file ends in the middle of a character"):
        build_corpus([path], tmp_path / "data", "word")
    assert list((tmp_path / "data").iterdir()) == []

"""Words come back exactly as long as they are known, however the text is cut; rare ones become <unk>."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import throughtime.lm.encoding as encoding
import throughtime.lm.reading as reading
from throughtime import InputError
from throughtime.lm import Tokenization, WordTokenizer, build_corpus, tokenizer_from_json
from throughtime.lm.words import cut, whole_words

ANY_TEXT = st.text(alphabet=st.sampled_from("ab한\u0301 \n\t.,'\"(-_1\u00a0\r"), max_size=40)


def knowing(text: str, **options) -> WordTokenizer:
    return WordTokenizer(list(dict.fromkeys(cut(text, options.get("split_punctuation", True)))), **options)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the dog", ["0the", "0dog"]),
        ("the  dog", ["0the", "0  ", "0dog"]),
        ("dog.", ["0dog", "1."]),
        ("dog .", ["0dog", "0."]),
        ("(dog)", ["2(", "0dog", "1)"]),
        ("well-known", ["0well", "3-", "0known"]),
        ("don't 'no'", ["0don't", "2'", "0no", "1'"]),
        ("a?!", ["0a", "1?", "1!"]),
        ('."a', ["0.", '3"', "0a"]),
        ("a\n\n  b \n", ["0a", "0\n\n  ", "0b", "0 \n"]),
        (" a ", ["0 ", "0a", "0 "]),
        ("e\u0301t\u00e9 नमस्ते", ["0e\u0301t\u00e9", "0नमस्ते"]),
        ("a <unk> b", ["0a", "0<unk>", "0b"]),
        ("a<unk>", ["0a", "3<", "0unk", "1>"]),
    ],
)
def test_what_a_word_is(text, pieces):
    assert cut(text) == pieces


def test_words_between_white_space_only():
    assert cut(" no it 's . \n", split_punctuation=False) == ["0 ", "0no", "0it", "0's", "0.", "0 \n"]


@given(ANY_TEXT, st.booleans())
def test_known_words_come_back_exactly(text, split):
    tokenizer = knowing(text, split_punctuation=split)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.decoder()
    assert "".join(decoder.push(int(i)) for i in ids) == text
    assert tokenizer.characters_of(ids) == len(text)
    assert tokenizer.bytes_of(ids) == len(text.encode())


@given(ANY_TEXT, st.integers(0, 40))
def test_a_text_may_be_cut_after_whole_words(text, place):
    """Pieces that end with a whole word are cut as the text is."""
    head, tail = whole_words(text[:place])
    assert head + tail == text[:place]
    rest = tail + text[place:]
    assert [*cut(head), *cut(rest, follows=bool(head))] == cut(text)


def test_the_unknown_word_and_what_is_known():
    tokenizer = knowing("the dog .\n")
    assert tokenizer.encode("the <unk> cat .").tolist() == [1, 0, 0, 3]
    assert tokenizer.decode([1, 0, 3, 4]) == "the <unk> .\n"
    assert tokenizer.vocabulary_size == 5
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.encode("the dog.").tolist() == tokenizer.encode("the dog.").tolist()


def test_lines_are_ended_and_their_outer_blanks_dropped():
    tokenizer = knowing("a b", sequences="line")
    assert tokenizer.encode_lines([" a b ", "b"]).tolist() == [2, 3, 1, 3, 1]
    assert tokenizer.decode([2, 3, 1, 3, 1]) == "a b\nb\n"


def test_a_prompt_leaves_its_last_space_to_the_next_word():
    assert knowing("a b").split_prompt("a ") == ("a", " ")
    assert knowing("a b").split_prompt("a\n  ") == ("a\n  ", "")


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
def test_a_corpus_of_words_comes_back(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    text = "the dog, the cat; the dog. 한글 the dog,\n\n the cat;\n" * 8
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "data", Tokenization("word", min_count=1))
    tokens = np.concatenate([corpus.train, corpus.held_out])
    assert corpus.tokenizer.decode(tokens) == text
    assert corpus.train.dtype == np.uint8
    assert tokens[:2].tolist() == corpus.tokenizer.encode("the dog").tolist()
    assert corpus.tokenizer.encode("the").tolist() == [1]  # the most frequent comes first


def test_rare_words_are_unknown_and_only_the_training_text_counts(tmp_path):
    (tmp_path / "a.txt").write_text("a a a b b c " * 10 + "once d d " + "a " * 30 + "held held held held held held")
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "data", Tokenization("word", min_count=2))
    assert corpus.tokenizer.words == ["0a", "0b", "0c", "0d"]
    assert 0 in corpus.train
    assert np.count_nonzero(corpus.held_out == 0) == 6
    small = build_corpus([tmp_path / "a.txt"], tmp_path / "data", Tokenization("word", vocabulary=3))
    assert small.tokenizer.words == ["0a", "0b"]
    assert small.tokenizer.vocabulary_size == 3


@pytest.mark.parametrize("level", ["word", "bpe"])
def test_a_skipped_file_leaves_no_word_held_back(tmp_path, monkeypatch, level):
    monkeypatch.setattr(reading, "CHUNK", 4)
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"one two")
    (folder / "b.txt").write_bytes(b"lost and gone\xff")
    (folder / "c.txt").write_bytes(b"fold three three")
    corpus = build_corpus([folder], tmp_path / "data", Tokenization(level, min_count=1), split=0.7)
    tokens = np.concatenate([corpus.train, corpus.held_out])
    expected = "one twofold three three"
    if level == "word":  # "three" is in the held-out part twice or once
        assert corpus.tokenizer.decode(tokens).split()[:2] == expected.split()[:2]
    else:
        assert corpus.tokenizer.decode(tokens) == expected
    assert len(corpus.left_out) == 1


def test_a_text_without_white_space_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "_LONGEST", 50)
    monkeypatch.setattr(reading, "CHUNK", 40)
    (tmp_path / "a.txt").write_text("ab" * 100)
    with pytest.raises(
        InputError, match=r"a\.txt: 50 characters without white space: not a text of words; use --level"
    ):
        build_corpus([tmp_path / "a.txt"], tmp_path / "data", "word")


def test_damaged_words_are_refused():
    with pytest.raises(InputError, match="a piece twice, or one without its digit"):
        WordTokenizer(["0a", "0a"])
    with pytest.raises(InputError, match="a piece twice, or one without its digit"):
        WordTokenizer(["a"])

"""Byte-pair encoding: every text comes back, the merges are learned from the training text, tokens don't depend on pieces."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import throughtime.lm.bpe as bpe_module
import throughtime.lm.reading as reading
from throughtime import InputError
from throughtime.lm import BpeTokenizer, Tokenization, build_corpus, tokenizer_from_json, train_bpe

TEXT = "the quick brown fox jumps over the lazy dog, 한글도 됩니다.\r\n" * 20


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return train_bpe([TEXT], 300)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.decoder()
    assert "".join(decoder.push(int(i)) for i in ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())
    assert tokenizer.characters_of(ids) == len(text)


def test_frequent_pieces_are_tokens(tokenizer):
    assert tokenizer.vocabulary_size == 300
    assert len(tokenizer.encode(TEXT)) < 0.5 * len(TEXT)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_lone_surrogates_are_read_as_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("piece", [7, 50])
def test_long_texts_are_cut_where_it_makes_no_difference(tokenizer, monkeypatch, piece):
    whole = tokenizer.encode(TEXT).tolist()
    monkeypatch.setattr(bpe_module, "_PIECE", 50)
    assert tokenizer.encode(TEXT).tolist() == whole
    monkeypatch.setattr(bpe_module, "_PIECE", piece)
    assert tokenizer.decode(tokenizer.encode("ab" * 200)) == "ab" * 200


@pytest.mark.parametrize("chunk", [1, 3, 64, 100_000])
def test_a_corpus_is_the_same_however_it_is_read(tmp_path, monkeypatch, chunk):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    monkeypatch.setattr(reading, "CHUNK", chunk)
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "data", Tokenization("bpe", vocabulary=300))
    tokens = np.concatenate([corpus.train, corpus.held_out])
    assert corpus.tokenizer.decode(tokens) == TEXT
    assert tokens.tolist() == corpus.tokenizer.encode(TEXT).tolist()


def test_merges_are_learned_from_what_is_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("abcd " * 90 + "wxyz " * 10)
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "data", Tokenization("bpe", vocabulary=300))
    assert len(corpus.tokenizer.encode(" abcd")) == 1
    assert len(corpus.tokenizer.encode(" wxyz")) == 5


def test_sequences_end_with_a_token_of_their_own():
    tokenizer = train_bpe([TEXT], 300, "line")
    ids = tokenizer.encode_lines(["the fox", "", "한"])
    assert tokenizer.decode(ids) == "the fox\n\n한\n"
    assert (ids == tokenizer.eos_id).sum() == 3
    assert tokenizer.eos_id == tokenizer.vocabulary_size - 1 == 300


def test_what_cant_be():
    with pytest.raises(InputError, match="--vocabulary 255: a bpe needs at least 256"):
        train_bpe([TEXT], 255)
    with pytest.raises(InputError, match="a bpe tokenizer's description is damaged"):
        BpeTokenizer({"model": {"type": "BPE"}})


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"needs Hugging Face's tokenizers: pip install 'throughtime\[bpe\]'"):
        train_bpe([TEXT], 300)

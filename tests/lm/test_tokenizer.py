"""Tokens of every script, known and unknown, whole and in pieces."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from throughtime import InputError
from throughtime.lm import ByteTokenizer, CharTokenizer, tokenizer_from_json

TEXTS = [
    "To be, or not",
    "안녕하세요 여러분",
    "שלום עולם",
    "नमस्ते",
    "e\u0301 e",
    "👩‍👩‍👧",
    "ᄒᆞᆫ글 jamo",
    "\r\n\t\ufeff",
    "𝄞",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("level", ["char", "byte"])
def test_round_trip_and_streaming(text, level):
    tokenizer = CharTokenizer(sorted(set(text))) if level == "char" else ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    decoder = tokenizer.decoder()
    assert "".join(decoder.push(int(i)) for i in ids) == text
    assert tokenizer.bytes_of(ids) == len(text.encode())
    assert tokenizer.characters_of(ids) == len(text)
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert np.array_equal(again.encode(text), ids)
    assert again.vocabulary_size == tokenizer.vocabulary_size


@given(st.text(max_size=30), st.sets(st.characters(), max_size=10))
def test_encoding_never_crashes_and_marks_what_is_unknown(text, known):
    tokenizer = CharTokenizer(sorted(known))
    ids = tokenizer.encode(text)
    assert [i == tokenizer.unknown_id for i in ids] == [c not in known for c in text]
    assert tokenizer.decode(ids) == "".join(c if c in known else "\ufffd" for c in text)
    assert all(0 <= i < tokenizer.vocabulary_size for i in ids)


@given(st.binary(max_size=20))
def test_any_bytes_decode_to_some_text(data):
    decoder = ByteTokenizer().decoder()
    streamed = "".join(decoder.push(byte) for byte in data)
    assert ByteTokenizer().decode(data).startswith(streamed)


def test_a_korean_syllable_comes_out_with_its_last_byte():
    decoder = ByteTokenizer().decoder()
    assert [decoder.push(byte) for byte in "한".encode()] == ["", "", "한"]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"level": "chat"}, "unknown level 'chat'; did you mean 'char'"),
        ({"level": "char"}, "lacks its characters"),
        ({}, "unknown level 'None'"),
    ],
)
def test_damaged_descriptions(description, message):
    with pytest.raises(InputError, match=message):
        tokenizer_from_json(description)


def test_a_repeated_character_is_refused():
    with pytest.raises(InputError, match="same character twice"):
        CharTokenizer("aba")

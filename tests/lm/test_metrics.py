"""A log of training is read as it was written; what is damaged or foreign in it is said."""

import math
import os
import zlib

import pytest

from throughtime.lm.metrics import line_of, open_metrics, read_metrics
from throughtime.training.files import CheckpointError

RECORDS = [
    {"step": 1, "seconds": 0.1, "loss": 4.0, "gradient_norm": None, "clipped": True},
    {"event": "validation", "step": 1, "seconds": 0.1, "loss": math.inf, "is_best": True},
    {"event": "rollback", "step": 2, "reason": "the loss became {nan}", "to_step": 0, "learning_rate": 0.1},
    {"step": 2, "seconds": 0.2, "loss": 3.0},
]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(map(line_of, RECORDS)))
    return tmp_path / "metrics.jsonl"


def test_it_is_read_as_it_was_written(path, tmp_path):
    assert read_metrics(path) == RECORDS
    assert read_metrics(tmp_path / "none") == []


def test_every_flipped_bit_is_refused(path):
    data = path.read_bytes()
    for place in range(8 * len(data)):
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        if place // 8 == len(data) - 1:  # the last line's end, without which the line is still whole
            with pytest.raises(CheckpointError, match="line 4 is damaged"):
                read_metrics(path)
        else:
            with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line \d"):
                read_metrics(path)


def test_a_last_line_that_was_cut_off_is_left_out_and_taken_away_before_more_is_written(path):
    data = path.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for length in range(last, len(data)):
        path.write_bytes(data[:length])
        assert read_metrics(path) == RECORDS[: 4 if length == len(data) - 1 else 3]
    path.write_bytes(data[:-5])
    with open_metrics(path) as file:
        file.write(line_of(RECORDS[3]))
    assert path.read_bytes() == data


@pytest.mark.parametrize("read", [read_metrics, open_metrics])
def test_a_line_without_end_is_refused_unread(path, read, little_memory):
    os.truncate(path, 40 << 30)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 5 is longer than 1,048,576 bytes"):
        read(path)


def forged(body):
    """A line of whatever, with the checksum that it would have."""
    body = body.removesuffix("}")
    return f'{body}, "crc32": {zlib.crc32(body.encode())}}}\n'


@pytest.mark.parametrize(
    "line",
    [
        "3\n",
        "null\n",
        '{"step": 1}\n',
        "\n",
        forged("3"),
        forged("[]"),
        forged('{"step": 1}'),
        forged('{"step": "1", "seconds": 1, "loss": 1}'),
        forged('{"step": 1, "seconds": 1, "loss": null}'),
        forged('{"step": 1, "seconds": 1, "loss": 1, "x": {}}'),
        forged('{"step": 1, "seconds": 1, "loss": 1, "x": "y"}'),
        forged('{"step": 1, "seconds": 1, "loss": 1, "event": []}'),
        forged('{"step": 1, "seconds": 1, "loss": 1, "event": "none"}'),
        forged('{"step": 1, "seconds": 1, "loss": 1' + "0" * 400 + "}"),
        forged('{"step": 1, "x": ' + "[" * 200_000),
    ],
)
def test_lines_that_are_none_are_refused(path, line):
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(CheckpointError, match="line 5"):
        read_metrics(path)

"""Every token of every sequence is a target once an epoch, after what stands before it in its own sequence."""

import numpy as np
import pytest

from throughtime import InputError
from throughtime.training import Sequences

END = 0


def made(lengths: list[int]) -> np.ndarray:
    """Sequences of different tokens, so that each can be told: its number times 100, and its place."""
    return np.concatenate([[*(100 * i + t for t in range(1, n)), END] for i, n in enumerate(lengths, start=1)])


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("window", [1, 4, 50])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_reads_every_sequence_from_its_start_to_its_end(batch, window, shuffle):
    lengths = [3, 1, 9, 4, 4, 12, 1, 5]
    sequences = Sequences(made(lengths), END, batch, window, seed=3, shuffle=shuffle)
    for epoch in range(2):
        read: dict[int, list[int]] = {}
        for step in range(epoch * len(sequences), (epoch + 1) * len(sequences)):
            inputs, targets, counts = sequences.window_at(step)
            assert inputs.shape == targets.shape == (int(counts.max()), len(counts))
            assert len(inputs) <= window
            rows = sequences.rows_at(step)
            assert len(set(rows.tolist())) == len(rows) <= batch
            for place, row in enumerate(rows.tolist()):
                before = read.setdefault(row, [])
                assert (before == []) == sequences.begins_epoch(step)
                count = int(counts[place])
                if count:
                    assert int(inputs[0, place]) == (before[-1] if before else END)
                    assert inputs[1:count, place].tolist() == targets[: count - 1, place].tolist()
                assert (targets[count:, place] == -100).all()
                before += targets[:count, place].tolist()
        assert [read[row] for row in range(len(lengths))] == [
            [*(100 * i + t for t in range(1, n)), END] for i, n in enumerate(lengths, start=1)
        ]


def test_lengths_in_a_batch_are_alike_and_epochs_differ():
    lengths = np.random.default_rng(0).integers(1, 30, 200).tolist()
    sequences = Sequences(made(lengths), END, batch=10, window=100, seed=1)
    assert len(sequences) == 20
    epochs = [[sequences.rows_at(step).tolist() for step in range(e * 20, e * 20 + 20)] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(map(len, epochs[0])) == [10] * 20
    waste = [sequences.window_at(step)[2] for step in range(20)]
    assert all(int(counts.max() - counts.min()) <= 4 for counts in waste)


def test_a_step_is_the_same_whenever_it_is_asked_for():
    sequences, again = (Sequences(made([5, 3, 7, 2, 2, 2]), END, 2, 3, seed=9) for _ in range(2))
    last = 3 * len(sequences) - 1
    expected = [sequences.window_at(step) for step in range(last + 1)]
    for step in (last, 0, last, 5):
        for a, e in zip(again.window_at(step), expected[step], strict=True):
            assert a.tolist() == e.tolist()


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([5, 0], {"batch": 0}, "batch = 0: expected a whole number, at least 1"),
        ([5, 0], {"window": 0}, "window = 0: expected a whole number, at least 1"),
        ([5, 6], {}, "2 tokens without an end-of-sequence token at their end"),
        ([], {}, "0 tokens without"),
        ([5, 0, 6], {}, "3 tokens without"),
    ],
)
def test_what_cant_be(tokens, options, message):
    with pytest.raises(InputError, match=message):
        Sequences(np.array(tokens), END, **{"batch": 2, "window": 3} | options)

"""A file is loaded whole or refused with its name and the reason, and what was there before survives a failed save."""

import os
import random

import pytest
import torch
from safetensors import safe_open

from throughtime.training.checkpoint import CheckpointError, load, load_json, save, save_json


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(3, 5), "ids": torch.arange(7), "empty": torch.zeros(0), "one": torch.tensor(2.0)}


def test_round_trip(tmp_path, tensors):
    state = {"step": 12, "name": '한글 "quoted" \n', "rates": [0.1, None], "sha256": "not the digest"}
    save(tmp_path / "a.safetensors", tensors, state)
    loaded, loaded_state = load(tmp_path / "a.safetensors")
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_any_safetensors_reader_can_open_it(tmp_path, tensors):
    save(tmp_path / "a.safetensors", tensors, {})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("weight"), tensors["weight"])


def test_the_same_tensors_and_state_are_the_same_bytes(tmp_path, tensors):
    state = {"b": 'an "sha256":"' + "0" * 64, "a": 1}
    written = set()
    for _ in range(20):  # the order of the library's own metadata is another each time
        tensors = dict(reversed(tensors.items()))
        save(tmp_path / "a.safetensors", tensors, state)
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1
    assert load(tmp_path / "a.safetensors")[1] == state


@pytest.mark.parametrize("more", [1, 40 << 30])
def test_a_longer_file_than_its_header_tells_of_is_refused_unread(tmp_path, tensors, more, little_memory):
    path = tmp_path / "a.safetensors"
    save(path, tensors, {})
    os.truncate(path, path.stat().st_size + more)
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: truncated or altered \([0-9,]* bytes, its header tells of"
    ):
        load(path)


def test_a_header_that_is_longer_than_any_is_refused_unread(tmp_path, little_memory):
    path = tmp_path / "a.safetensors"
    path.write_bytes((30 << 30).to_bytes(8, "little"))
    os.truncate(path, 40 << 30)
    with pytest.raises(CheckpointError, match="not a checkpoint of throughtime"):
        load(path)


def test_a_file_for_which_there_is_no_memory_is_named(tmp_path, little_memory):
    path = tmp_path / "a.safetensors"
    header = b'{"x": {"dtype": "U8", "shape": [42949672960], "data_offsets": [0, 42949672960]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (40 << 30))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: needs more memory than there is"):
        load(path)


def test_tied_and_strided_tensors_are_written_as_they_are(tmp_path):
    shared = torch.randn(4, 4)
    save(tmp_path / "a.safetensors", {"a": shared, "b": shared, "t": shared.T}, {})
    loaded, _ = load(tmp_path / "a.safetensors")
    assert torch.equal(loaded["t"], shared.T)
    assert torch.equal(loaded["a"], loaded["b"])


def test_every_truncation_is_refused(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save(path, tensors, {"step": 1})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"a\.safetensors: (truncated or altered|not a checkpoint)"):
            load(path)


def test_every_flipped_bit_of_a_sample_is_refused(tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save(path, tensors, {"step": 1})
    data = path.read_bytes()
    chooser = random.Random(1)
    for _ in range(2000):
        spoilt = bytearray(data)
        place = chooser.randrange(8 * len(data))
        spoilt[place // 8] ^= 1 << place % 8
        path.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
            load(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 100, b"{}"])
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a checkpoint of throughtime"):
        load(path)


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_failed_save_leaves_what_was_there(tmp_path, tensors, monkeypatch, call):
    path = tmp_path / "a.safetensors"
    save(path, tensors, {"step": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    if call == "fsync":
        monkeypatch.setattr("os.fsync", fail)
    elif call == "replace":
        monkeypatch.setattr("pathlib.Path.replace", fail)
    else:
        monkeypatch.setattr("os.open", fail)
    with pytest.raises(
        CheckpointError, match="can't be written: No space left on device; what was saved before is still"
    ):
        save(path, tensors, {"step": 2})
    monkeypatch.undo()
    assert load(path)[1] == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="a folder, expected a plain file"):
        load(tmp_path)


def test_json_round_trip_and_refusals(tmp_path):
    path = tmp_path / "a.json"
    digest = save_json(path, {"characters": "한\ud800a"})
    assert load_json(path, digest) == {"characters": "한\ud800a"}
    with pytest.raises(CheckpointError, match="altered since it was written"):
        load_json(path, "0" * 64)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_json(path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list; expected an object"):
        load_json(path)

import numpy as np
import pytest

from fedcmr.shared import checkpoint
from fedcmr.shared.errors import UserError


def save_rounds(folder, count):
    for server_round in range(count):
        arrays = {"a/weight": np.full((2, 3), server_round, np.float32)}
        checkpoint.save(checkpoint.round_path(folder, server_round), arrays, {"server_round": server_round})


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.float32(3).reshape(())}
    metadata = {"plan": None, "sites": {"A": [1, 2.5]}}
    checkpoint.save(tmp_path / "new" / "x.safetensors", arrays, metadata)
    loaded, loaded_metadata = checkpoint.load(tmp_path / "new" / "x.safetensors")
    assert loaded_metadata == metadata
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)


def test_nothing_partial_stays_behind(tmp_path):
    save_rounds(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_0000.safetensors", "round_0001.safetensors"]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    save_rounds(tmp_path, 1)
    before = checkpoint.round_path(tmp_path, 0).read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.save(checkpoint.round_path(tmp_path, 0), {"a": np.ones(3, np.float32)}, {})
    assert checkpoint.round_path(tmp_path, 0).read_bytes() == before


def test_the_newest_round_is_taken_by_number_not_by_name(tmp_path):
    for server_round in (2, 9999, 10000):
        checkpoint.save(
            checkpoint.round_path(tmp_path, server_round), {"a": np.zeros(1, np.float32)}, {"r": server_round}
        )
    assert checkpoint.load_newest(tmp_path)[1] == {"r": 10000}


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-1]])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    save_rounds(tmp_path, 3)
    newest = checkpoint.round_path(tmp_path, 2)
    newest.write_bytes(damage(newest.read_bytes()))
    arrays, metadata = checkpoint.load_newest(tmp_path)
    assert metadata == {"server_round": 1}
    assert (arrays["a/weight"] == 1).all()


def test_no_checkpoint_is_a_fresh_start_but_unreadable_ones_are_an_error(tmp_path):
    assert checkpoint.load_newest(tmp_path / "absent") is None
    save_rounds(tmp_path, 1)
    checkpoint.round_path(tmp_path, 0).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="none of 1 checkpoints"):
        checkpoint.load_newest(tmp_path)


def test_a_foreign_safetensors_file_is_no_checkpoint(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "foreign.safetensors")

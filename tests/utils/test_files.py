"""Files are either whole or not there."""

import pytest
import torch

from utils.files import load_whole, save_atomically


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "value.pt"
    save_atomically(path, {"value": torch.arange(3)})
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save_atomically(path, {"state": lambda: None})  # cannot be pickled, found out half-way
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["value.pt"]


def test_a_saved_file_keeps_the_one_before_where_asked(tmp_path):
    path, previous = tmp_path / "value.pt", tmp_path / "previous.pt"
    for value in range(3):
        save_atomically(path, value, previous)
    assert (load_whole(path), load_whole(previous)) == (2, 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["previous.pt", "value.pt"]

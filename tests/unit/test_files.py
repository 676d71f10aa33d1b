"""A reader, or a crash, never meets half of a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gspo_dist.files import replacing, whole_folder, write_text


def test_the_new_file_appears_when_the_block_ends(tmp_path: Path):
    path = tmp_path / "state.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == path.parent  # a rename is atomic within one file system only
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "state.json"
    path.write_text("old")

    def half() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_text_is_written_as_utf_8_and_is_on_the_disk(tmp_path: Path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write_text(tmp_path / "a.txt", "größer → ∞\n")
    assert (tmp_path / "a.txt").read_bytes() == "größer → ∞\n".encode()
    assert synced == [len("größer → ∞\n".encode())]  # all of it, before the rename


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "lone surrogate \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    target.mkdir()  # empty, as a user may have made it
    with whole_folder(target) as partial:
        partial.mkdir()
        (partial / "a").write_text("x")
        assert list(target.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (target / "a").read_text() == "x"


def test_a_folder_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupted():
        with whole_folder(tmp_path / "other") as partial:
            partial.mkdir()
            (partial / "a").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []

"""The recorded end of a run."""

from __future__ import annotations

import logging

import pytest

from gspo_dist.studies.ending import Ending, read_ending, write_ending

END = Ending("gspo", 3, "died", "exit status 1: gone", 12.5, 7, ["-m", "x"])


def test_an_end_is_read_as_it_was_written(tmp_path):
    assert read_ending(tmp_path) is None
    write_ending(tmp_path, END)
    assert read_ending(tmp_path) == END


@pytest.mark.parametrize("content", ["", '{"arm": "gspo", ', '{"arm": "gspo"}', "[]", "null", "7"])
def test_a_torn_end_is_said_and_counts_as_none(tmp_path, caplog, content):
    (tmp_path / "status.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert read_ending(tmp_path) is None
    assert f"{tmp_path / 'status.json'} is torn" in caplog.text

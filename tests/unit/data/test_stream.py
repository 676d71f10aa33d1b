"""A file that is never held: every row once an epoch, exact resuming, repeats left out, bounded memory."""

from __future__ import annotations

import json
import re
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.config import DataConfig
from gspo_dist.data import stream, training
from gspo_dist.data.stream import StreamCursor, StreamedSource
from gspo_dist.data.training import load_training


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 4)
    monkeypatch.setattr(stream, "WINDOW", 3)
    monkeypatch.setattr(stream, "CHUNK", 5)


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    else:
        # An empty line is no row, and rows keep their true line numbers.
        path.write_text("".join(json.dumps(row) + "\n" * (1 + (i == 2)) for i, row in enumerate(rows)))
    return path


def rows_of(n):
    return [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(n)]


def source(path, **config) -> StreamedSource:
    options = {"train": str(path), "heldout": None, "stream_above_mb": 0, **config}
    train, _ = load_training(DataConfig(**options), build_tokenizer(), max_prompt_tokens=12, seed=0)
    (part,) = train.parts.values()
    assert isinstance(part, StreamedSource)
    return part


def texts(prompts):
    return [prompt.text for prompt in prompts]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("n", [1, 4, 13, 30])
def test_every_epoch_holds_every_row_once_in_an_order_of_its_own(tmp_path, suffix, n):
    own = source(write(tmp_path / f"a{suffix}", rows_of(n)))
    assert len(own) == n
    cursor = StreamCursor(own, seed=3)
    epochs = [texts(cursor.next(n)) for _ in range(3)]
    everything = sorted(f"{i}+1=" for i in range(n))
    assert [sorted(epoch) for epoch in epochs] == [everything] * 3
    if n > 4:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert texts(StreamCursor(own, seed=3).next(n)) == epochs[0]
        assert texts(StreamCursor(own, seed=4).next(n)) != epochs[0]
    straight = StreamCursor(own, seed=3, shuffle=False)
    assert texts(straight.next(n)) == [f"{i}+1=" for i in range(n)]


def test_a_file_of_one_block_has_another_order_each_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 64)
    cursor = StreamCursor(source(write(tmp_path / "a.jsonl", rows_of(30))), seed=3)
    assert texts(cursor.next(30)) != texts(cursor.next(30))


@pytest.mark.parametrize("cut", [1, 5, 12, 13, 14, 27, 40])
def test_a_resumed_cursor_goes_on_with_the_very_next_prompt(tmp_path, cut):
    path = write(tmp_path / "a.jsonl", [*rows_of(20), *rows_of(6)])
    whole = StreamCursor(source(path), seed=7)
    whole.next(cut)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = StreamCursor(source(path), seed=7)
    resumed.load_state_dict(state)
    assert texts(resumed.next(33)) == texts(whole.next(33))
    drawn, again = StreamCursor(source(path), seed=7), StreamCursor(source(path), seed=7)
    places = drawn.draw(cut)
    assert max(places) < drawn.size == 26
    assert texts(again.prompts(places)) == texts(StreamCursor(source(path), seed=7).next(cut))
    assert drawn.state_dict() == state
    with pytest.raises(ValueError, match="data cursor: seed must be"):
        StreamCursor(source(path), seed=8).load_state_dict(state)
    write(path, rows_of(21))
    with pytest.raises(ValueError, match="got 21, it has 26"):
        StreamCursor(source(path), seed=7).load_state_dict(state)


def test_rows_that_repeat_a_question_are_left_out(tmp_path, caplog):
    own = source(write(tmp_path / "a.jsonl", [*rows_of(10), *rows_of(7), {"prompt": "9+9=", "answer": "18"}]))
    assert own.repeats.tolist() == list(range(10, 17))
    assert "7 rows repeat the question of an earlier one" in caplog.text
    cursor = StreamCursor(own, seed=0)
    assert sorted(texts(cursor.next(11))) == sorted([f"{i}+1=" for i in range(10)] + ["9+9="])
    assert cursor.epoch == 0
    cursor.next(1)
    assert cursor.epoch == 1


def test_rows_are_named_by_their_line(tmp_path):
    own = source(write(tmp_path / "a.jsonl", rows_of(9)))
    places = [int(re.search(r":(\d+)$", prompt.prompt_id).group(1)) for prompt in own]
    assert places == [1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_a_mark_of_utf8_is_no_part_of_the_first_row_and_utf16_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", rows_of(6))
    text = path.read_text()
    path.write_text(text, encoding="utf-8-sig")
    assert texts(source(path)) == [f"{i}+1=" for i in range(6)]
    path.write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.jsonl must be UTF-8: it is UTF-16"):
        source(path, bad_rows="skip")


def test_a_file_that_is_cut_while_the_run_goes_on_stops_it(tmp_path):
    path = write(tmp_path / "a.jsonl", rows_of(9))
    own = source(path)
    write(path, rows_of(2))
    with pytest.raises(ValueError, match=r"a\.jsonl ends at line 3: it was cut since"):
        list(own)


def test_what_is_left_out_of_a_streamed_file_is_said_as_it_adds_up(tmp_path, caplog):
    rows = [{"prompt": f"{i}+2="} for i in range(12)] + [{"prompt": "1" * 30, "answer": "1"}]
    own = source(write(tmp_path / "a.jsonl", [*rows_of(5), *rows]), bad_rows="skip", too_long="skip")
    caplog.clear()
    assert len(list(own)) == 5
    said = [record.getMessage() for record in caplog.records]
    assert [re.search(r"(\d+) rows .* and (\d+) prompts", line).groups() for line in said] == [
        ("1", "0"),
        ("10", "0"),
    ]
    assert "a.jsonl:7: no field 'answer'" in said[0]
    assert own.too_long == 1


def test_bad_and_long_rows_stop_or_are_skipped_and_counted(tmp_path):
    rows = [*rows_of(5), {"prompt": "77+1="}, {"prompt": "1" * 30, "answer": "1"}]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:7: no field 'answer'"):
        list(source(path))
    with pytest.raises(ValueError, match=r"a\.jsonl:8: a prompt must have at most .* got 30"):
        list(source(path, bad_rows="skip"))
    own = source(path, bad_rows="skip", too_long="skip")
    cursor = StreamCursor(own, seed=0)
    assert sorted(texts(cursor.next(5))) == sorted(f"{i}+1=" for i in range(5))
    cursor.next(5)  # a second epoch
    assert own.too_long >= 1
    assert any(":7: no field 'answer'" in message for message in own.bad.skipped)
    write(path, rows[5:6])
    with pytest.raises(ValueError, match="every row is left out"):
        StreamCursor(source(path, bad_rows="skip"), seed=0).next(1)


def test_held_out_prompts_and_checks_are_kept_when_a_rows_turn_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKED", 3)
    path = write(tmp_path / "a.jsonl", rows_of(9))
    held = write(tmp_path / "h.jsonl", [{"prompt": "100+1=", "answer": "101"}])
    config = DataConfig(train=str(path), heldout=str(held), stream_above_mb=0)
    train, heldout = load_training(config, build_tokenizer(), max_prompt_tokens=12, seed=0)
    assert texts(heldout) == ["100+1="]
    with path.open("a") as file:  # after the check of the first ones
        file.write(json.dumps({"prompt": "100+1=", "answer": "101"}) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:11: train and heldout must share no prompt"):
        load_training(config, build_tokenizer(), max_prompt_tokens=12, seed=0)[0].cursor(
            seed=0, shuffle=True
        ).next(10)

    def no_five(prompt):
        if prompt.answer == "5":
            raise ValueError("five")

    train.add_check(no_five)
    with pytest.raises(ValueError, match="five"):
        train.cursor(seed=0, shuffle=True).next(9)


def test_a_form_that_cannot_be_streamed_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows_of(3)))
    with pytest.raises(ValueError, match=r"over data\.stream_above_mb, and only \.jsonl and \.parquet"):
        source(path)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """Ten times the rows: the index has 16 bytes more per row, and nothing else grows."""
    monkeypatch.setattr(stream, "BLOCK", 64)

    def peak(n):
        path = tmp_path / f"{n}.jsonl"
        row = json.dumps({"prompt": "1+%d=", "answer": "1", "text": "x" * 500})
        path.write_text("".join(row % i + "\n" for i in range(n)))
        tracemalloc.start()
        StreamCursor(source(path), seed=0).next(200)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(300)  # what is imported and made once
    small, large = peak(600), peak(2_600)
    assert large - small < 2_000 * 40  # a row has 560 bytes

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
from gspo_dist.data import blocks, stream, training
from gspo_dist.data.stream import StreamCursor, StreamedSource
from gspo_dist.data.training import load_training


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
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
    monkeypatch.setattr(blocks, "BLOCK", 64)
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


def saved(folder, rows, batch=3):
    """What `Dataset.save_to_disk` writes: two files, in batches that are no blocks."""
    folder.mkdir()
    files = []
    for i, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        table = pyarrow.Table.from_pylist(part)
        files.append({"filename": f"data-{i:05d}-of-00002.arrow"})
        with pyarrow.ipc.new_stream(str(folder / files[-1]["filename"]), table.schema) as sink:
            sink.write_table(table, max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    return folder


def hub_like(folder, rows):
    (folder / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows[:11]), folder / "data/train-0.parquet")
    write(folder / "data/train-1.jsonl", rows[11:])
    write(folder / "data/test-0.jsonl", [{"prompt": "9+9=", "answer": "18"}])
    return folder


@pytest.mark.parametrize("form", [saved, hub_like])
def test_a_folder_is_one_source(tmp_path, form):
    own = source(form(tmp_path / "set", [*rows_of(26), *rows_of(2)]))
    assert own.rows.sizes.max() == 4  # of row groups of 11, or batches of 3
    assert own.repeats.tolist() == [26, 27]
    assert texts(own) == [f"{i}+1=" for i in range(26)]
    cursor = StreamCursor(own, seed=5)
    assert sorted(texts(cursor.next(26))) == sorted(f"{i}+1=" for i in range(26))
    state = cursor.state_dict()
    again = StreamCursor(source(tmp_path / "set"), seed=5)
    again.load_state_dict(state)
    assert texts(again.next(9)) == texts(cursor.next(9))
    held, _ = load_training(
        DataConfig(train=str(tmp_path / "set"), heldout=None), build_tokenizer(), max_prompt_tokens=12, seed=0
    )
    assert len(list(held)) == 26  # below the limit it is held
    (tmp_path / "set/train.csv").write_text("prompt,answer\n1+1=,2\n")
    if form is hub_like:
        with pytest.raises(ValueError, match=r"set \(train\.csv\) is over data\.stream_above_mb, and only"):
            source(tmp_path / "set")


def test_a_row_group_of_any_size_is_read_in_blocks(tmp_path):
    """pyarrow and pandas put a million rows into one row group."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows_of(30)), path)
    own = source(path)
    assert own.rows.sizes.tolist() == [4] * 7 + [2]
    assert [row["prompt"] for _, row in own.rows.block(3)] == [f"{i}+1=" for i in range(12, 16)]
    assert [where.rpartition(" ")[2] for where, _ in own.rows.block(7)] == ["28", "29"]
    assert list(own.rows.scan()) == [row for at in range(8) for row in own.rows.block(at)]


def test_a_torn_file_is_named(tmp_path):
    for path in (write(tmp_path / "a.parquet", rows_of(9)), saved(tmp_path / "set", rows_of(9))):
        torn = path if path.is_file() else path / "data-00001-of-00002.arrow"
        whole = torn.read_bytes()
        torn.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"(a\.parquet|\.arrow) must be an? .*; copy it again"):
            source(path)


def test_a_block_is_read_once_for_all_that_is_wanted_of_it(tmp_path, monkeypatch):
    """Prompts come by their numbers in a run, so that a checkpoint can keep those of begun rollouts."""
    reads = []
    block = blocks.JsonlFile.block
    monkeypatch.setattr(blocks.JsonlFile, "block", lambda self, at: (reads.append(at), block(self, at))[1])
    a, b = (write(tmp_path / f"{name}.jsonl", rows_of(24)) for name in "ab")
    config = DataConfig(mixture={str(a): 1.0, str(b): 1.0}, heldout=None, stream_above_mb=0)
    train, _ = load_training(config, build_tokenizer(), max_prompt_tokens=12, seed=0)
    for cursor in (StreamCursor(train.parts[str(a)], seed=0), train.cursor(seed=0, shuffle=True)):
        reads.clear()
        first = cursor.draw(10)
        windows = len(reads)
        assert len(cursor.prompts(first)) == 10
        assert len(reads) == windows  # they are at hand
    fresh = train.cursor(seed=0, shuffle=True)
    drawn = train.cursor(seed=0, shuffle=True).draw(40)
    reads.clear()
    again = fresh.prompts(drawn)
    assert len(reads) <= 12  # of 6 blocks in each file
    assert texts(again) == texts(train.cursor(seed=0, shuffle=True).next(40))


def test_answers_that_nobody_can_judge_stop_or_are_skipped_when_their_turn_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "KEPT", 2)

    def odd(prompt):
        if int(prompt.answer) % 2 == 0:
            raise ValueError(f"{prompt.prompt_id}: cannot read the answer {prompt.answer}")

    path = write(tmp_path / "a.jsonl", rows_of(12))
    for skip in (False, True):
        bad_rows = "skip" if skip else "stop"
        config = DataConfig(train=str(path), heldout=None, stream_above_mb=0, bad_rows=bad_rows)
        train, _ = load_training(config, build_tokenizer(), max_prompt_tokens=12, seed=0)
        train.judge(odd, skip=skip)
        cursor = train.cursor(seed=0, shuffle=True)
        if not skip:
            with pytest.raises(ValueError, match=r"a\.jsonl:\d+: cannot read the answer"):
                cursor.next(12)
            continue
        assert sorted(p.answer for p in cursor.next(6)) == sorted(str(i) for i in range(1, 12, 2))
        cursor.next(12)
        (own,) = train.parts.values()
        assert own.bad_rows >= 12  # two epochs
        assert len(own.bad.skipped) == 2  # an endless run keeps no endless list


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
    with pytest.raises(ValueError, match=r"every row is left out: 0 prompts over .*no field 'answer'"):
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
    with pytest.raises(ValueError, match=r"over data\.stream_above_mb, and only \.jsonl, \.parquet and"):
        source(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, suffix):
    """Ten times the rows: the index has 16 bytes more per row, and nothing else grows.

    A Parquet file has one row group here, of which only the rows of a block become values.
    """
    monkeypatch.setattr(blocks, "BLOCK", 64)

    def peak(n):
        path = tmp_path / f"{n}{suffix}"
        rows = [{"prompt": f"1+{i}=", "answer": "1", "text": "x" * 500} for i in range(n)]
        if suffix == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        del rows
        tracemalloc.start()
        StreamCursor(source(path), seed=0).next(200)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(300)  # what is imported and made once
    small, large = peak(600), peak(2_600)
    assert large - small < 2_000 * 40  # a row has 560 bytes

"""Every form of a data file gives the same rows, one at a time; what cannot be read is named by its place."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from gspo_dist.data import formats
from gspo_dist.data.formats import BadRow, rows
from gspo_dist.data.records import BadRows, read_file

ROWS = [{"prompt": f"q{i}", "answer": str(i)} for i in range(5)]


def saved(folder, table=None):
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    table = table or pyarrow.Table.from_pylist(ROWS)
    for i, part in enumerate((table.slice(0, 3), table.slice(3))):
        with pyarrow.ipc.new_stream(str(folder / f"data-{i:05d}-of-00002.arrow"), part.schema) as stream:
            stream.write_table(part)
    files = [{"filename": f"data-{i:05d}-of-00002.arrow"} for i in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write(tmp_path, kind):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    path = tmp_path / f"train.{kind}"
    if kind == "jsonl.gz":
        with gzip.open(path, "wt") as file:
            file.write(lines)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "csv":
        path.write_text("prompt,answer\n" + "".join(f"{r['prompt']},{r['answer']}\n" for r in ROWS))
    elif kind == "tsv":
        path.write_text("prompt\tanswer\n" + "".join(f"{r['prompt']}\t{r['answer']}\n" for r in ROWS))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    elif kind == "folder":
        return saved(tmp_path / "saved")
    elif kind == "dict":
        saved(tmp_path / "saved/train")
        (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
        return tmp_path / "saved"
    elif kind == "files":
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub/train-00000.jsonl").write_text(lines)
        (tmp_path / "hub/test-00000.jsonl").write_text('{"prompt": "other", "answer": ""}\n')
        return tmp_path / "hub"
    else:
        path.write_text(lines)
    return path


KINDS = ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet", "folder", "dict", "files"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_rows(tmp_path, kind):
    source = write(tmp_path, kind)
    assert formats.is_data(str(source))
    assert [row for _, row in rows(str(source))] == ROWS


def test_rows_are_named_by_their_place(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"a":\n  2}, {"a": 3}\n]\n')
    assert [(where.rpartition(":")[2], row["a"]) for where, row in rows(str(path))] == [
        ("2", 1),
        ("4", 2),
        ("5", 3),
    ]
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,"two\nlines"\n3,4\n5\n')
    found = list(rows(str(path)))
    assert [where.rpartition(":")[2] for where, _ in found] == ["3", "4", "5"]
    assert found[0][1] == {"a": "1", "b": "two\nlines"}
    assert isinstance(found[2][1], BadRow)
    assert "must have the 2 columns" in str(found[2][1])


@pytest.mark.parametrize("cut", [1, 3, 7, 64])
def test_a_json_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, cut):
    monkeypatch.setattr(formats, "CHUNK", cut)
    values = [{"a": 1.5, "b": "x" * 50}, 12345, {"c": ["]", "}", '"']}, 7]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, indent=1))
    assert [row for _, row in rows(str(path))] == values


def test_a_torn_json_array_is_named_by_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n{"a": }]')
    with pytest.raises(ValueError, match=r"a\.json:2: a \.json file must be an array of objects: Expecting"):
        list(rows(str(path)))
    path.write_text('{"a": 1}\n{"a": 2}\n')  # lines under another name
    assert [row["a"] for _, row in rows(str(path))] == [1, 2]


def test_nothing_behind_a_json_array_is_lost(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for chunk in (4, 1 << 20):
        monkeypatch.setattr(formats, "CHUNK", chunk)
        path.write_text('[{"a": 1}]\n \n')
        assert len(list(rows(str(path)))) == 1
        path.write_text('[{"a": 1}]\n\n[{"a": 2}]')
        with pytest.raises(ValueError, match=r"a\.json:3: a \.json file must be one array .*: '\[\{"):
            list(rows(str(path)))


def test_a_torn_gzip_file_is_named(tmp_path):
    path = write(tmp_path, "jsonl.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"jsonl\.gz must be a gzip file: .* after line 0 \(Compressed"):
        list(rows(str(path)))
    path.write_bytes(b'{"prompt": "a", "answer": 1}\n')
    with pytest.raises(ValueError, match=r"must be a gzip file: .*Not a gzipped file"):
        list(rows(str(path)))


def test_cells_of_any_length_and_columns_of_one_name(tmp_path):
    """The csv module stops at 131,072 characters by itself: tests of programs are longer."""
    path = tmp_path / "a.csv"
    path.write_text(f'a,b\n{"x" * 200_000},"1\r\n2"\n', newline="")
    ((where, row),) = rows(str(path))
    assert where == f"{path}:3"
    assert (len(row["a"]), row["b"]) == (200_000, "1\r\n2")
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ValueError, match=r"a\.csv:1: columns must have different names: got a, b, a"):
        list(rows(str(path)))
    path.write_bytes("a,b\n1,2\ncaf\xe9,2\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"a\.csv must be UTF-8: .* -f LATIN1 -t UTF-8 a\.csv > utf8\.csv"):
        list(rows(str(path)))


def test_a_large_json_array_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK", 1 << 16)
    path = tmp_path / "a.json"
    path.write_text("[" + ",\n".join(json.dumps({"a": i, "b": "x" * 1000}) for i in range(8000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in rows(str(path))) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20  # of a file of 8 MB


def test_bad_rows_stop_or_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": 1}\n{torn\n{"prompt": "b"}\n{"prompt": "c", "answer": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:2: a line must be one JSON object"):
        read_file(str(path), "prompt", "answer")
    bad = BadRows(skip=True)
    assert [r.question for r in read_file(str(path), "prompt", "answer", bad=bad)] == ["a", "c"]
    assert [message.split(": ")[0].rpartition(":")[2] for message in bad.skipped] == ["2", "3"]
    path.write_text("{torn\n")
    with pytest.raises(ValueError, match=r"all 1 rows are bad, the first: .*:1: a line"):
        read_file(str(path), "prompt", "answer", bad=BadRows(skip=True))


def test_a_missing_split_and_a_folder_of_nothing_are_named(tmp_path):
    folder = write(tmp_path, "dict")
    with pytest.raises(ValueError, match="must have the split 'test': it has train"):
        list(rows(str(folder), "test"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"save_to_disk wrote.*no data files"):
        list(rows(str(tmp_path / "empty")))


def test_a_name_on_the_hub_is_its_folder_in_the_cache(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, repo_type, allow_patterns):
        asked.append((name, repo_type, "*.parquet" in allow_patterns))
        return str(write(tmp_path, "files"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert [row for _, row in rows("hub:org/set")] == ROWS
    assert asked == [("org/set", "dataset", True)]

    def offline(*args, **kwargs):
        raise OSError("offline mode is enabled")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="offline mode is enabled; download it with `hf download"):
        list(rows("hub:org/set"))


def test_a_line_that_python_will_not_read_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": ' + "9" * 5000 + "}\n" + "[" * 200_000 + "\n" + json.dumps(ROWS[0]) + "\n")
    found = [row for _, row in rows(str(path))]
    assert [isinstance(row, BadRow) for row in found] == [True, True, False]
    assert "a.jsonl:1: a line must be one JSON object: Exceeds the limit" in str(found[0])
    assert "a.jsonl:2: a line must be one JSON object: " in str(found[1])

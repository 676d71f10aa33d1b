"""What `gspo data` finds in a source, and where copies of one benchmark contradict one another."""

from __future__ import annotations

import json

import pytest

from gspo_dist.cli.main import main
from gspo_dist.coldstart.tokenizer import build_tokenizer
from gspo_dist.config import DataConfig, RewardConfig
from gspo_dist.data.inspect import compare_sources, histogram, inspect
from gspo_dist.data.records import Record
from gspo_dist.data.schemas import as_messages

CIRCLES = r"Eight circles of radius $34$ are tangent to $\overline{BC}$ of $\triangle ABC$. Find $m+n$."
OTHER = "Find the number of residents of Aimeville who own all four of these things."


def records(*pairs, name="a"):
    return [Record(f"{name}:{i}", as_messages(q), a) for i, (q, a) in enumerate(pairs, start=1)]


def test_the_findings_by_hand():
    tokenizer = build_tokenizer()
    rows = records(
        ("1+1=", "2"), ("1+2=", "3"), ("1+1=", "2"), ("1+2=", "4"), ("11+22=", {"a": 1}), ("ß", "1")
    )
    found = inspect(
        rows, DataConfig(), tokenizer=tokenizer, reward=RewardConfig("math"), max_prompt_tokens=5, show=1
    )
    assert found.records == 6
    assert found.shown == [("a:1", "1+1=", tuple(tokenizer("1+1=")["input_ids"]), "2")]
    assert found.lengths == {4: 4, 6: 1}
    assert found.duplicates == [("a:3", "a:1")]
    assert found.contradictions == [("a:4", "a:2", "4", "3")]
    assert found.too_long == ["a:5: 6 tokens"]
    assert len(found.unreadable) == 1
    assert found.unreadable[0].startswith("a:5: an answer must be")
    assert len(found.unrenderable) == 1
    assert "a:6" in found.unrenderable[0]


def test_without_a_tokenizer_lengths_are_characters():
    found = inspect(records(([{"role": "user", "content": "abc"}], 1)), DataConfig())
    assert found.lengths == {3: 1}
    assert found.unreadable == []


def test_the_histogram_has_at_most_ten_bins_that_hold_everything():
    lines = histogram(dict.fromkeys(range(1, 101), 3), "tokens")
    assert len(lines) == 10
    assert lines[0].split()[:5] == ["1", "to", "10", "tokens", "30"]
    assert all(line.endswith("#" * 40) for line in lines)
    assert histogram({7: 2}, "tokens")[0].split()[:5] == ["7", "to", "7", "tokens", "2"]
    assert histogram({}, "tokens") == []


def test_a_wrong_answer_is_outvoted_by_copies_in_other_spellings():
    ours = records(([{"from": "user", "value": CIRCLES}], "480"), (OTHER, "073"))
    others = {
        "b": records(
            (OTHER, "73"),
            (CIRCLES.replace(r"\overline{BC}", "BC").replace("$", "") + " Put it in a box.", "197"),
            name="b",
        ),
        "c": records((CIRCLES, "197"), name="c"),
        "d": records(("Find the number of something else entirely, please.", "73"), name="d"),
    }
    (wrong,), matched = compare_sources(ours, others)
    assert matched == 2
    assert (wrong.where, wrong.answer, wrong.is_outvoted) == ("a:1", "480", True)
    assert wrong.others == (("b:2", "197"), ("c:1", "197"))
    # Seen from a right copy the same question is a difference that most agree with.
    (seen,), _ = compare_sources(others["c"], {"a": ours, "b": others["b"]})
    assert not seen.is_outvoted


def test_the_command(tmp_path, capsys):
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.jsonl"
    ours.write_text(json.dumps([{"problem": CIRCLES, "answer": "480"}, {"problem": OTHER, "answer": "73"}]))
    theirs.write_text(json.dumps({"problem": CIRCLES, "answer": "197"}) + "\n{torn\n")
    main(["data", str(ours), "--against", str(theirs), "--show", "1"])
    out = capsys.readouterr().out
    assert f"--- {ours}:1\n{CIRCLES}\n--- answer '480'" in out
    assert OTHER not in out
    assert "2 records in" in out
    assert "0 answers cannot be read by the reward math" in out
    assert "1 questions are in the 1 other copies, 1 with another answer" in out
    assert f"{ours}:1: 480; outvoted: look at this answer; others: 197 ({theirs}:1)" in out
    main(["data", str(theirs), "--reward", "none", "--show", "0"])
    assert "1 rows are no records" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["data", str(tmp_path / "none.jsonl")])
    assert stop.value.code == 2

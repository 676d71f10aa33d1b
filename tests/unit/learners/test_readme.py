"""The table of model families in the learners' README is what the code says today."""

from __future__ import annotations

from benchmarks import learner_families


def test_the_table_of_families_is_what_the_code_says() -> None:
    text = learner_families.README.read_text()
    assert learner_families.with_table(text) == text, "run: python benchmarks/learner_families.py --write"

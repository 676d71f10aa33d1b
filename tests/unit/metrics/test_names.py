"""The table of logged keys: what it says of a key, its page, and whether it is what runs log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gspo_dist.metrics.names import metric_of, metrics, page
from gspo_dist.metrics.table import PLACEHOLDERS, SECTIONS

PACKAGE = Path(__file__).resolve().parents[3] / "gspo_dist"


@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("objective/loss", "objective/loss"),
        ("objective/mini_batch_12/clip_fraction", "objective/mini_batch_{index}/clip_fraction"),
        ("routing/update/flip_fraction/layer_07", "routing/update/flip_fraction/layer_{layer}"),
        ("routing/update/flip_fraction", "routing/update/flip_fraction"),
        ("objective/sequence_ratio/q99", "objective/sequence_ratio/q{percent}"),
        ("eval/aime24/avg@32", "eval/{suite}/avg@{k}"),
        ("eval/aime24/avg@32_standard_error", "eval/{suite}/avg@{k}_standard_error"),
        ("reward/timeout_fraction", "reward/timeout_fraction"),
        ("reward/answered", "reward/{part}"),
        ("objective/mini_batch_x/clip_fraction", None),
        ("objective/losses", None),
        ("xobjective/loss", None),
    ],
)
def test_a_key_is_its_own_entry_or_the_one_whose_placeholders_it_fills(key, entry):
    found = metric_of(key)
    assert (found.key if found else None) == entry


def test_the_readme_is_the_rendered_table():
    assert (PACKAGE / "metrics" / "README.md").read_text(encoding="utf-8") == page(), (
        "run python -m gspo_dist.metrics.names > gspo_dist/metrics/README.md"
    )


def test_every_entry_is_whole_and_there_once():
    keys = [metric.key for metric in metrics()]
    assert len(set(keys)) == len(keys)
    for metric in metrics():
        assert metric.unit, metric.key
        assert metric.meaning.endswith("."), metric.key
        assert set(re.findall(r"\{(\w+)\}", metric.key)) <= set(PLACEHOLDERS)
        assert (
            "|" not in metric.key + metric.unit + metric.meaning + metric.when
        )  # it would end a table's cell
    for section in SECTIONS:
        assert (PACKAGE / section.source).is_file(), section.source


@pytest.mark.parametrize("metric", list(metrics()), ids=lambda metric: metric.key)
def test_an_entry_finds_itself(metric):
    """No entry is shadowed by an earlier one: its example is looked up as itself."""
    example = {"index": "3", "layer": "07", "k": "4", "percent": "99", "suite": "aime24", "part": "format"}
    assert metric_of(metric.key.format(**example)) is metric


def test_a_unit_that_ends_a_name_is_the_unit_of_the_entry():
    """`namespace/name` with the unit last: a name that ends in _s is in seconds, and so on."""
    endings = {
        "_tokens_per_s": "tokens per second",
        "_gib_per_s": "GiB per second",
        "_s": "seconds",
        "_bytes": "bytes",
        "_fraction": "share",
        "_tokens": "tokens",
        "_clip_widths": "clip widths",
    }
    for metric in metrics():
        name = metric.key.rsplit("/", 1)[-1]
        unit = next((unit for ending, unit in endings.items() if f"_{name}".endswith(ending)), None)
        assert unit is None or metric.unit == unit, metric.key

"""The W&B page of a study shows metrics that runs log, and says what it would group."""

from __future__ import annotations

import json
import sys

import pytest

from gspo_dist.metrics.names import metric_of
from gspo_dist.studies.workspace import Page, make_page, sections, workspace


def test_every_panel_names_a_metric_that_runs_log():
    """What the table of metrics has is held to real runs by tests/unit/metrics/test_names.py."""
    panels = [panel for section in sections(4) for panel in section.panels]
    shown = {panel.metric for panel in panels} | {panel.x for panel in panels}
    assert [key for key in shown if metric_of(key) is None] == []
    assert len({(p.metric, p.x) for p in panels}) == len({p.title for p in panels}) == len(panels)


def test_the_description_holds_the_study_its_grouping_and_all_panels(tmp_path):
    path = tmp_path / "page.json"
    assert make_page(Page("mine", sections=sections(8)), path) == [str(path)]
    page = json.loads(path.read_text())
    assert (page["name"], page["project"]) == ("mine: arms", "gspo_dist")
    assert (page["filter"], page["group_by"]) == ({"tags": "mine"}, "tags")
    metrics = [panel["metric"] for section in page["sections"] for panel in section["panels"]]
    assert metrics[0] == "eval/heldout/accuracy"
    assert "objective/mini_batch_7/clip_fraction" in metrics
    assert "objective/mini_batch_3/clip_fraction" not in metrics


def test_a_page_without_an_owner_is_refused():
    with pytest.raises(ValueError, match="name it with --entity"):
        make_page(Page("mine"), create=True)


def test_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="got neither; give --to FILE, --create, or both"):
        make_page(Page("mine"))


def test_a_missing_package_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ValueError, match="pip install wandb-workspaces, or write the description with --to"):
        workspace(Page("mine", entity="team"))

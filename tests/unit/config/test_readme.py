"""conf/README.md names every file of conf/, says which are the defaults, and its examples compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from gspo_dist.cli.compose import compose

CONF = Path(__file__).resolve().parents[3] / "conf"
TEXT = (CONF / "README.md").read_text()


def listed() -> dict[str, dict[str, str]]:
    """Group -> file -> what the README says of it."""
    found = {}
    for part in re.split(r"^### ", TEXT.split("## Sections without a group")[0], flags=re.M)[1:]:
        group = part.split(":", 1)[0]
        found[group] = dict(re.findall(r"^\| `(\S+\.yaml)` \| (.+) \|$", part, re.M))
    return found


def test_every_file_of_conf_is_named_and_every_name_is_a_file() -> None:
    files = {str(p.relative_to(CONF)) for p in CONF.rglob("*.yaml")} - {"config.yaml"}
    assert {f"{group}/{file}" for group, lines in listed().items() for file in lines} == files


def test_the_defaults_that_it_names_are_those_of_config_yaml() -> None:
    chosen = {}
    for entry in yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]:
        if isinstance(entry, dict):
            chosen |= {k: v for k, v in entry.items() if v is not None and not k.startswith("override")}
    said = {
        group: file.removesuffix(".yaml")
        for group, lines in listed().items()
        for file, line in lines.items()
        if "(the default)" in line
    }
    assert said | {"logger": "default"} == chosen


@pytest.mark.parametrize("example", re.findall(r"^\| `([^`]+=[^`]+)` \| ", TEXT, re.M))
def test_its_overrides_compose(example: str) -> None:
    words = shlex.split(example)
    if words[0] == "-m":
        words = [word.split(",")[0] for word in words[1:]]
    assert compose(words)


def test_its_experiment_of_your_own_runs(tmp_path: Path) -> None:
    body = re.search(r"```yaml\n(.*?)```", TEXT, re.S)
    assert body is not None
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(body[1])
    composed = compose(["experiment=mine"], [tmp_path])
    assert (composed["learner"]["backend"], composed["steps"]) == ("megatron", 200)
    assert composed["objective"]["routing_replay"] == "r3"

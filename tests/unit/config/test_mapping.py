"""Configs from plain mappings and back: what YAML and JSON give, by type and by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gspo_dist.config import RunConfig
from gspo_dist.config.mapping import described, from_mapping, knobs, read_mapping, to_mapping


@dataclass(frozen=True)
class Inner:
    pair: tuple[float, float] = (0.0, 1.0)
    names: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    count: int = 1
    share: float = 0.5
    flag: bool = False
    name: str | None = None
    inner: Inner = field(default_factory=Inner)


def test_what_yaml_gives_becomes_what_the_fields_say():
    values = {
        "count": 3,
        "share": 2,
        "name": "x",
        "inner": {"pair": [1, 2], "names": ["a"], "table": {"k": 1}},
    }
    config = from_mapping(Outer, values)
    assert config == Outer(3, 2.0, False, "x", Inner((1, 2), ["a"], {"k": 1}))
    assert isinstance(config.share, float)
    assert isinstance(config.inner.pair, tuple)


def test_a_round_trip_through_json_keeps_everything():
    config = from_mapping(RunConfig, {"steps": 3, "objective": {"name": "grpo", "old_logprobs": "recompute"}})
    assert from_mapping(RunConfig, json.loads(json.dumps(to_mapping(config)))) == config


def test_the_plain_mapping_shares_nothing_with_the_config():
    config = Outer(inner=Inner(names=["a"]))
    plain = to_mapping(config)
    plain["inner"]["names"].append("b")
    assert config.inner.names == ["a"]
    assert plain["inner"]["pair"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"cont": 3},
            r"unknown config key 'cont': did you mean 'count'\? known: count, share, flag, name, inner",
        ),
        (
            {"inner": {"nmes": []}},
            r"unknown config key 'inner.nmes': did you mean 'names'\? known: pair, names, table",
        ),
        ({"count": True}, r"count must be a whole number: got True"),
        ({"count": 1.5}, r"count must be a whole number: got 1.5"),
        ({"count": None}, r"count must be a whole number: got None"),
        ({"share": "half"}, r"share must be a number: got 'half'"),
        ({"share": False}, r"share must be a number: got False"),
        ({"flag": 1}, r"flag must be true or false: got 1"),
        ({"name": 3}, r"name must be a text: got 3"),
        ({"inner": {"names": "a"}}, r"inner.names must be a list: got 'a'"),
        ({"inner": {"pair": 3}}, r"inner.pair must be a list: got 3"),
        ({"inner": {"table": []}}, r"inner.table must be a mapping: got \[\]"),
        ({"inner": 3}, r"inner must be a section, whose knobs are set one by one: got 3"),
    ],
)
def test_other_types_and_names_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(Outer, values)


def test_null_is_for_fields_that_say_so():
    assert from_mapping(Outer, {"name": None}).name is None


def test_knobs_are_the_dotted_names_of_sections_and_fields():
    assert list(knobs(Outer)) == [
        *("count", "share", "flag", "name", "inner", "inner.pair", "inner.names", "inner.table")
    ]
    assert described(knobs(Outer)["name"]) == "a text"
    assert knobs(RunConfig)["learner.optimizer.lr"] is float


def test_a_run_folders_configuration_is_read_or_named(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes('{"run_dir": "größe"}'.encode())
    assert read_mapping(path) == {"run_dir": "größe"}
    for text, problem in (
        (b'{"a": 1', "JSONDecodeError"),
        (b"[1]", "it holds a list"),
        (b'"gr\xf6"', "UnicodeDecodeError"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=problem) as refused:
            read_mapping(path)
        assert str(refused.value).startswith(f"{path} must hold a run's configuration as a JSON object: ")
        assert "remove the file and repeat" in str(refused.value)

"""A study: named arms (config differences), seeds, and what every run shares. Read from conf/study/NAME.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gspo_dist.objectives.names import nearest


@dataclass(frozen=True)
class Study:
    """What `gspo compare` runs.

    base: overrides of every run, e.g. ("experiment=quickstart", "steps=40"). arms: name -> overrides of that arm.
    reference: the arm that the others are compared with. parallel: runs side by side.
    """

    name: str
    base: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    reference: str
    dir: str
    title: str = ""
    parallel: int = 1
    threads: int = 0
    """CPU threads of each run's process (OMP_NUM_THREADS); 0 leaves the environment as it is."""
    retry_failed: bool = False
    overrides: tuple[str, ...] = field(default=())
    """From the command line, after the base and before the arm."""

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ValueError(f"study {self.name} must have arms and seeds: got {len(self.arms)} and {len(self.seeds)}")
        if self.reference not in self.arms:
            raise ValueError(f"study.reference must be an arm: got {self.reference!r}; {nearest(self.reference, self.arms)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"study.seeds must differ from each other: got {list(self.seeds)}")
        for arm in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9_.+-]+", arm):
                raise ValueError(f"an arm's name becomes a folder: got {arm!r}; use letters, digits, _ . + -")

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed), seed after seed: an interrupted study has whole seeds."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def run_dir(self, arm: str, seed: int) -> Path:
        return Path(self.dir) / arm / f"seed-{seed}"

    def run_overrides(self, arm: str, seed: int) -> list[str]:
        """All overrides of one run: `gspo train` with these repeats it alone."""
        return [
            *self.base, *self.overrides, *self.arms[arm], f"seed={seed}", f"run_dir={self.run_dir(arm, seed)}",
            f"logger.wandb.group={self.name}", f"logger.wandb.name={arm}-seed{seed}",
            f"logger.wandb.tags=[{self.name},{arm}]",
        ]


def load_study(args: Sequence[str], conf: Path, read_yaml: Any) -> Study:
    """`study=NAME|FILE`, `study.KEY=VALUE` (seeds, arms, dir, parallel, threads, reference, retry_failed), and run overrides.

    read_yaml(path) -> mapping; handed in because reading YAML belongs to the command line.
    Raises ValueError for an unknown study, key or arm.
    """
    options: dict[str, str] = {}
    overrides = []
    for arg in args:
        key, equals, value = arg.partition("=")
        if not equals:
            raise ValueError(f"overrides have the form key=value: got {arg!r}")
        if key == "study" or key.startswith("study."):
            options[key] = value
        else:
            overrides.append(arg)
    name = options.pop("study", "gspo_vs_grpo")
    known = sorted(p.stem for p in (conf / "study").glob("*.yaml"))
    path = Path(name) if name.endswith((".yaml", ".yml")) else conf / "study" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"study {name!r} is neither a file nor one of conf/study; {nearest(name, known)}")
    raw = dict(read_yaml(path))
    study = Study(
        name=path.stem, base=tuple(raw.pop("base", ())), arms={k: tuple(v) for k, v in raw.pop("arms", {}).items()},
        seeds=tuple(raw.pop("seeds", (0,))), reference=raw.pop("reference"), dir=raw.pop("dir", f"runs/{path.stem}"),
        title=raw.pop("title", ""), parallel=raw.pop("parallel", 1), threads=raw.pop("threads", 0),
        overrides=tuple(overrides), retry_failed=raw.pop("retry_failed", False),
    )
    if raw:
        raise ValueError(f"study {path} has unknown keys {sorted(raw)}; known: {', '.join(OPTIONS)}, base, title")
    return _apply(study, options)


OPTIONS = ("seeds", "arms", "dir", "parallel", "threads", "reference", "retry_failed")


def _apply(study: Study, options: Mapping[str, str]) -> Study:
    for key, value in options.items():
        field_name = key.removeprefix("study.")
        if field_name not in OPTIONS:
            raise ValueError(f"unknown study key {key!r}; {nearest(field_name, OPTIONS)}")
        if field_name == "seeds":
            study = replace(study, seeds=tuple(int(s) for s in value.strip("[]").split(",")))
        elif field_name == "arms":
            names = value.strip("[]").split(",")
            missing = [n for n in names if n not in study.arms]
            if missing:
                raise ValueError(f"study {study.name} has no arm {missing[0]!r}; {nearest(missing[0], study.arms)}")
            reference = study.reference if study.reference in names else names[0]
            study = replace(study, arms={n: study.arms[n] for n in names}, reference=reference)
        elif field_name in ("parallel", "threads"):
            study = replace(study, **{field_name: int(value)})
        elif field_name == "retry_failed":
            study = replace(study, retry_failed=value.lower() == "true")
        else:
            study = replace(study, **{field_name: value})
    return study

"""A study, as conf/study/NAME.yaml describes it: named arms, seeds, and what every run shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo_dist.checks import nearest


@dataclass(frozen=True)
class Study:
    """What `gspo compare` runs.

    `load_study` reads and checks the types; what a value may be is checked here.
    """

    name: str
    """The stem of its file; a group and a tag in W&B."""
    base: tuple[str, ...]
    """Overrides of every run: ("experiment=quickstart", "steps=40"), say."""
    arms: Mapping[str, tuple[str, ...]]
    """Name -> overrides of that arm."""
    seeds: tuple[int, ...]
    """Every arm runs with each of them."""
    reference: str
    """The arm that the others are compared with."""
    dir: str
    """Folder of the runs, ARM/seed-SEED each, and of the report."""
    title: str = ""
    """Heading of the report; empty: the name."""
    parallel: int = 1
    """Runs side by side."""
    threads: int = 0
    """CPU threads of each run's process (OMP_NUM_THREADS); 0 leaves the environment as it is."""
    retry_failed: bool = True
    """Whether a study submitted again goes on with the runs that died, each from its newest checkpoint (from
    the start where it has none); false leaves them as they are."""
    overrides: tuple[str, ...] = field(default=())
    """From the command line, after the base and before the arm."""

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ValueError(
                f"study {self.name} must have arms and seeds: got {len(self.arms)} and {len(self.seeds)}"
            )
        if self.reference not in self.arms:
            tail = nearest(self.reference, self.arms)
            raise ValueError(f"study.reference must be an arm: got {self.reference!r}; {tail}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"study.seeds must differ from each other: got {list(self.seeds)}")
        for arm in self.arms:
            if not re.fullmatch(r"[A-Za-z0-9_.+-]+", arm):
                raise ValueError(f"an arm's name becomes a folder: got {arm!r}; use letters, digits, _ . + -")
        for key, least in (("parallel", 1), ("threads", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"study.{key} must be at least {least}: got {getattr(self, key)}")

    @property
    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed), seed after seed: an interrupted study has whole seeds."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    def run_dir(self, arm: str, seed: int) -> Path:
        """The run folder of one arm and seed."""
        return Path(self.dir) / arm / f"seed-{seed}"

    def run_overrides(self, arm: str, seed: int) -> list[str]:
        """All overrides of one run: `gspo train` with these repeats it alone."""
        folder, study = _quoted(str(self.run_dir(arm, seed))), _quoted(self.name)
        return [
            *self.base,
            *self.overrides,
            *self.arms[arm],
            f"seed={seed}",
            f"run_dir={folder}",
            f"logger.wandb.group={study}",
            f"logger.wandb.name={arm}-seed{seed}",
            f"logger.wandb.tags=[{study},{arm}]",
        ]


def _quoted(text: str) -> str:
    """`text` as a value of hydra's override grammar: as it is where every character is plain, else in quotes.

    A plain folder stays unquoted: an ended run is known by its overrides, and older versions quoted nothing.
    """
    if re.fullmatch(r"[A-Za-z0-9_./+-]+", text):
        return text
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"'{escaped}'"


# -- reading --


def load_study(args: Sequence[str], conf: Path, read_yaml: Callable[[Path], Any]) -> Study:
    """`study=NAME|FILE`, `study.KEY=VALUE` for a KEY of OPTIONS, and overrides of every run.

    read_yaml(path) -> its content; handed in because reading YAML belongs to the command line.
    Raises ValueError for an unknown study, key or arm, and for a value that its key cannot have.
    """
    options, overrides = _split(args)
    path = _study_file(options.pop("study", "gspo_vs_grpo"), conf)
    raw = read_yaml(path)
    if not isinstance(raw, Mapping):
        raise ValueError(
            f"study {path} must map keys to values: got {raw!r}; known keys: {', '.join(READERS)}"
        )
    if unknown := [key for key in raw if key not in READERS]:
        raise ValueError(f"study {path} has unknown keys {unknown}; known: {', '.join(READERS)}")
    values = {
        key: READERS[key](f"{key} in study {path}", value) for key, value in {"arms": None, **raw}.items()
    }
    chosen = options.pop("study.arms", None)
    for key, text in options.items():
        name = key.removeprefix("study.")
        if name not in OPTIONS:
            raise ValueError(f"unknown study key {key!r}; {nearest(name, OPTIONS)}")
        values[name] = READERS[name](key, text)
    if "reference" not in values:
        raise ValueError(
            f"a study must name the arm that the others are compared with: {path} has no reference; "
            f"add the line reference: {next(iter(values['arms']), 'NAME')}, or give study.reference"
        )
    if chosen is not None:
        values["arms"] = _some_arms(path.stem, values["arms"], chosen)
        if "study.reference" not in options and values["reference"] not in values["arms"]:
            values["reference"] = next(iter(values["arms"]))
    defaults = {"base": (), "seeds": (0,), "dir": f"runs/{path.stem}"}
    return Study(path.stem, **{**defaults, **values}, overrides=tuple(overrides))


def _split(args: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(the study's own options, overrides of every run)."""
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
    return options, overrides


def _study_file(name: str, conf: Path) -> Path:
    """conf/study/NAME.yaml, or the file that `name` is."""
    path = Path(name).expanduser() if name.endswith((".yaml", ".yml")) else conf / "study" / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (conf / "study").glob("*.yaml"))
        raise ValueError(f"study {name!r} is neither a file nor one of conf/study; {nearest(name, known)}")
    return path


def _some_arms(study: str, arms: Mapping[str, tuple[str, ...]], text: str) -> dict[str, tuple[str, ...]]:
    """Those of `arms` that `text` names."""
    names = _items(text)
    if missing := [n for n in names if n not in arms]:
        raise ValueError(f"study {study} has no arm {missing[0]!r}; {nearest(missing[0], arms)}")
    return {n: arms[n] for n in names}


# A value comes from YAML with its type, or as text from the command line. `key` names it in the error.


def _items(value: Any) -> list[Any]:
    """The parts of a list, of the text [a, b], or the one value there is."""
    if isinstance(value, str):
        return [part.strip() for part in value.strip().strip("[]").split(",")]
    return list(value) if isinstance(value, Sequence) else [value]


def _whole(key: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if type(value) is not int:  # True is an int, but no number of anything
        raise ValueError(f"{key} must be a whole number: got {value!r}; write 2, say")
    return value


def _seeds(key: str, value: Any) -> tuple[int, ...]:
    try:
        return tuple(_whole(key, item) for item in _items(value))
    except ValueError:
        raise ValueError(f"{key} must be whole numbers: got {value!r}; write [0,1,2], say") from None


def _flag(key: str, value: Any) -> bool:
    flag = {"true": True, "false": False}.get(str(value).lower())
    if flag is None:
        raise ValueError(f"{key} must be true or false: got {value!r}")
    return flag


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"{key} must be a text: got {value!r}; write one, in quotes where YAML reads another type"
        )
    return value.strip()


def _folder(key: str, value: Any) -> str:
    return str(Path(_text(key, value)).expanduser())


def _overrides(key: str, value: Any) -> tuple[str, ...]:
    """A list of overrides. One text is refused: as a sequence it would be its characters."""
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(v, str) for v in value)
    ):
        raise ValueError(
            f"{key} must be a list of overrides: got {value!r}; write [objective=gspo, steps=40], say"
        )
    return tuple(value)


def _arms(key: str, value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping) or not all(isinstance(arm, str) for arm in value):
        raise ValueError(
            f"{key} must map names to lists of overrides: got {value!r}; write {{NAME: [key=value]}}"
        )
    return {arm: _overrides(f"arm {arm} of {key}", own) for arm, own in value.items()}


READERS: dict[str, Callable[[str, Any], Any]] = {
    "seeds": _seeds,
    "arms": _arms,
    "dir": _folder,
    "parallel": _whole,
    "threads": _whole,
    "reference": _text,
    "retry_failed": _flag,
    "base": _overrides,
    "title": _text,
}
"""Key of a study file -> its reader, (name for errors, value) -> checked value."""
OPTIONS = tuple(key for key in READERS if key not in ("base", "title"))
"""Keys that the command line may set: study.KEY=VALUE."""

"""The list of suites, and how a name with its options becomes one."""

from __future__ import annotations

import datetime
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gspo_dist.checks import above, at_least, nearest
from gspo_dist.config import EvaluationConfig, RewardConfig
from gspo_dist.evaluation import elo
from gspo_dist.evaluation.files import find
from gspo_dist.evaluation.problem import Suite
from gspo_dist.evaluation.tasks import codeforces, humaneval, livecodebench, maths
from gspo_dist.evaluation.tasks.programs import ProgramGrader
from gspo_dist.rewards.reward import resolve_reward
from gspo_dist.sandbox.choose import sandbox_named
from gspo_dist.sandbox.protocol import Sandbox

GRADING = {"reward", "reward_options", "correct_at", "deadline_s", "time_factor", "memory_factor"}
"""Options that change a verdict: samples that were graded by others are not taken up again."""
SAMPLING = {"samples", "temperature", "top_p", "max_tokens", "limit"}
"""Options of every suite. limit: only the first so many problems."""


def load_suites(
    config: EvaluationConfig, root: str | None, env: Mapping[str, str] | None = None
) -> list[Suite]:
    """The suites that `evaluation.suites` names, their data read and checked. Starts nothing.

    env: variables of the processes that judge by a reward, beside this one's.

    Raises ValueError for an unknown suite or option, and for data that is missing or cannot be used.
    """
    for name in config.options:
        if name != "all" and name not in config.suites:
            raise ValueError(
                f"evaluation.options may hold all and the suites of the run: got {name!r}; "
                f"{nearest(name, ['all', *config.suites])}"
            )
    suites = [_suite(name, dict(config.options), root) for name in config.suites]
    for suite in suites:
        if isinstance(suite.grader, maths.RewardGrader):
            suite.grader.env = dict(env or {})
    return suites


def _suite(name: str, options: Mapping[str, Any], root: str | None) -> Suite:
    own = {**(options.get("all") or {}), **(options.get(name) or {})}
    make = MAKERS.get(name)
    if make is None:
        if "file" not in own:
            raise ValueError(
                f"evaluation.suites holds an unknown suite {name!r}; {nearest(name, MAKERS)}. A suite of "
                f"your own has a file and a reward: evaluation.options.{name}.file=F "
                f"evaluation.options.{name}.reward=math"
            )
        make = own_suite
    defaults = {k: p.default for k, p in inspect.signature(make).parameters.items()}
    known = set(defaults) - {"name", "root"}
    for option in own:
        if option not in known | SAMPLING:
            raise ValueError(
                f"evaluation.options.{name} has no option {option!r}; "
                f"{nearest(option, sorted(known | SAMPLING))}"
            )
    suite = make(name=name, root=root, **{k: v for k, v in own.items() if k in known})
    rules = {option: own.get(option, defaults[option]) for option in sorted(GRADING & known)}
    return _sampled(replace(suite, rules=rules), own)


def _sampled(suite: Suite, own: Mapping[str, Any]) -> Suite:
    """The suite with the sampling that the options ask for."""
    where = f"evaluation.options.{suite.name}"
    for option in ("samples", "max_tokens", "limit"):
        if not isinstance(own.get(option), int | None):
            raise ValueError(f"{where}.{option} must be a whole number: got {own[option]!r}")
    for option, low in (("samples", 1), ("max_tokens", 1), ("limit", 1), ("temperature", 0)):
        at_least(f"{where}.{option}", own.get(option), low)
    above(f"{where}.top_p", own.get("top_p"), 0)
    if (own.get("top_p") or 0) > 1:
        raise ValueError(f"{where}.top_p must be at most 1: got {own['top_p']}")
    changes = {name: own[name] for name in SAMPLING - {"limit"} if own.get(name) is not None}
    limit = own.get("limit")
    if limit is not None and limit < len(suite.problems):
        changes |= {
            "problems": suite.problems[:limit],
            "notes": (*suite.notes, f"only the first {limit} of {len(suite.problems)} problems"),
        }
    return replace(suite, **changes)


def _boxed(question: str, instruction: str) -> str:
    return f"{question}\n\n{instruction}"


def _maths(
    patterns: Sequence[str],
    source: str,
    samples: int,
    temperature: float,
    top_p: float,
    integers: bool,
    *,
    name: str,
    root: str | None,
    file: str | None = None,
    instruction: str = maths.INSTRUCTION,
    workers: int = 2,
    deadline_s: float = 30.0,
) -> Suite:
    path = find(name, root, file, patterns, source)
    grader: maths.AimeGrader | maths.RewardGrader = maths.AimeGrader()
    if not integers:
        grader = maths.RewardGrader(RewardConfig("math", workers=workers, timeout_s=deadline_s))
    problems = maths.read_problems(path, functools.partial(_boxed, instruction=instruction))
    maths.check_golds(problems, grader)
    rule = "whole numbers from 0 to 999" if integers else "the math reward (math-verify)"
    return Suite(
        name,
        problems,
        grader,
        samples,
        temperature,
        top_p,
        notes=(f"file {path.name}", f"compared as {rule}"),
    )


def _livecodebench(
    window: tuple[str | None, str | None],
    default_release: str | None,
    *,
    name: str,
    root: str | None,
    file: str | None = None,
    release: str | None = None,
    start: str | None = "default",
    end: str | None = "default",
    window_rule: str = "days",
    thinking: bool = False,
    sandbox: str = "auto",
    sandbox_url: str | None = None,
    workers: int = 2,
) -> Suite:
    if window_rule not in ("days", "official"):
        raise ValueError(
            f"evaluation.options.{name}.window_rule must be days or official: got {window_rule!r}"
        )
    release = release or default_release
    if release is not None and release not in livecodebench.RELEASES:
        raise ValueError(
            f"evaluation.options.{name}.release must be a release: got {release!r}; "
            f"{nearest(release, livecodebench.RELEASES)}"
        )
    start = window[0] if start == "default" else _day(f"{name}.start", start)
    end = window[1] if end == "default" else _day(f"{name}.end", end)
    source = "huggingface.co/datasets/livecodebench/code_generation_lite (test.jsonl to test6.jsonl)"
    files = _release_files(name, root, file, release, source)
    problems, notes = livecodebench.read(files, start=start, end=end, rule=window_rule, thinking=thinking)
    # The published files are named by release; rows are not.
    unchecked = release is not None and files[0].name != "test.jsonl"
    place = _sandbox(name, sandbox, sandbox_url)
    grader = ProgramGrader(functools.partial(livecodebench.judge, sandbox=place), workers)
    said = [
        f"files {', '.join(path.name for path in files)}",
        *([f"one file holds what it holds: release {release} is not checked"] if unchecked else ()),
        *notes,
        f"programs run in sandbox {place.name}",
    ]
    return Suite(name, tuple(problems), grader, 8, 0.6, 0.95, notes=tuple(said))


def _day(option: str, text: str | None) -> str | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text).isoformat()
    except (ValueError, TypeError):
        raise ValueError(
            f"evaluation.options.{option} must be a day such as 2024-10-01, or null: got {text!r}"
        ) from None


def _release_files(
    name: str, root: str | None, file: str | None, release: str | None, source: str
) -> list[Path]:
    if file is None and root is not None:
        # The published folder has files of one name in a row; a single file may have any.
        for folder in sorted(p for p in Path(root).expanduser().rglob("*") if p.is_dir()):
            named = folder.name.lower().replace("-", "_")
            if named in ("livecodebench", "code_generation_lite") and (folder / "test.jsonl").is_file():
                return livecodebench.release_files(folder, release)
    path = find(name, root, file, ("*livecodebench*rows*.jsonl", "livecodebench*.jsonl"), source)
    return livecodebench.release_files(path, release)


def _codeforces(
    *,
    name: str,
    root: str | None,
    file: str | None = None,
    ids: str | None = None,
    standings: str | None = None,
    ratings: str | None = None,
    time_factor: float = 3.0,
    memory_factor: float = 2.0,
    sandbox: str = "auto",
    sandbox_url: str | None = None,
    workers: int = 2,
) -> Suite:
    source = "huggingface.co/datasets/open-r1/codeforces, or rllm's data/test/code/codeforces.json"
    path = find(
        name, root, file, ("*codeforces*problems*", "codeforces.json*", "*codeforces_[0-9]*.json"), source
    )
    problems, notes = codeforces.read(path, Path(ids).expanduser() if ids else None)
    place = _sandbox(name, sandbox, sandbox_url)
    grader = ProgramGrader(codeforces.Judge(place, time_factor, memory_factor), workers)
    wanted = sorted({codeforces.contest_of(problem.problem_id) for problem in problems})
    where = _optional(root, standings, ("all_contest_data.json", "*standings*.json"))
    contests, left_out = (
        elo.read_contests(where, wanted) if where else ({}, dict.fromkeys(wanted, "no standings"))
    )
    table_file = _optional(root, ratings, ("*ratings*.json",))
    table = elo.read_table(table_file) if table_file else None
    said = [
        f"file {path.name}",
        *notes,
        f"time limits x {time_factor:g} and memory limits x {memory_factor:g}, for Python",
        f"Elo: standings of {len(contests)} of {len(wanted)} contests"
        + ("" if where else " (none stored; evaluation.options.codeforces.standings names a file or folder)"),
        f"percentiles by {table_file.name}" if table_file else "no table of ratings: no percentile",
    ]
    more = functools.partial(
        codeforces.ratings,
        contests=contests,
        left_out=left_out,
        table=table,
        table_name=table_file.name if table_file else "",
    )
    return Suite(name, tuple(problems), grader, 8, 0.6, 0.95, notes=tuple(said), more=more)


def _optional(root: str | None, given: str | None, patterns: Sequence[str]) -> Path | None:
    """A further file of a suite: `given`, or the first below `root` that fits; None where there is none."""
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise ValueError(f"evaluation.options.codeforces: no such file: {path}")
        return path
    if root is None:
        return None
    return next((p for one in patterns for p in sorted(Path(root).expanduser().rglob(one))), None)


def _humaneval(
    *,
    name: str,
    root: str | None,
    file: str | None = None,
    sandbox: str = "auto",
    sandbox_url: str | None = None,
    workers: int = 2,
) -> Suite:
    path = Path(file).expanduser() if file else humaneval.package_file()
    if not path.is_file():
        raise ValueError(f"evaluation.options.{name}: no such file: {path}")
    place = _sandbox(name, sandbox, sandbox_url)
    grader = ProgramGrader(functools.partial(humaneval.judge, sandbox=place), workers)
    return Suite(name, tuple(humaneval.read(path)), grader, 1, 0.0, 1.0, notes=(f"file {path.name}",))


def own_suite(
    *,
    name: str,
    root: str | None,
    file: str,
    reward: str = "math",
    reward_options: Mapping[str, Any] | None = None,
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    instruction: str = "",
    correct_at: float = 1.0,
    workers: int = 2,
    deadline_s: float = 60.0,
) -> Suite:
    """A suite of one's own: a file in any schema of the data room, graded by a named reward."""
    path = find(name, root, file, (), "you")
    chosen = RewardConfig(reward, dict(reward_options or {}), workers=workers, timeout_s=deadline_s)
    resolve_reward(chosen)
    grader = maths.RewardGrader(chosen, correct_at)
    ask = functools.partial(_boxed, instruction=instruction) if instruction else str
    problems = maths.read_problems(path, ask, prompt_key, answer_key)
    maths.check_golds(problems, grader)
    notes = (f"file {path.name}", f"graded by {reward}, right from {correct_at:g} on")
    return Suite(name, problems, grader, 1, 0.0, 1.0, notes=notes)


def _sandbox(name: str, sandbox: str, url: str | None) -> Sandbox:
    return sandbox_named(sandbox, url, field=f"evaluation.options.{name}.sandbox")


_AIME = "the copies of rllm, NeMo-Skills or Qwen2.5-Math on GitHub"
# samples, temperature and top-p: DeepSeek-R1 and Qwen3 in thinking mode; GSPO reports avg@32 and avg@8.
MAKERS: dict[str, Callable[..., Suite]] = {
    "aime24": functools.partial(
        _maths,
        ("*aime*24*",),
        f"{_AIME}, or huggingface.co/datasets/HuggingFaceH4/aime_2024",
        32,
        0.6,
        0.95,
        True,
    ),
    "aime25": functools.partial(
        _maths, ("*aime*25*",), f"{_AIME}, or huggingface.co/datasets/math-ai/aime25", 32, 0.6, 0.95, True
    ),
    "amc": functools.partial(_maths, ("*amc*",), "rllm or Qwen2.5-Math on GitHub", 32, 0.6, 0.95, False),
    "math500": functools.partial(
        _maths, ("*math*500*",), "simpleRL-reason on GitHub, or HuggingFaceH4/MATH-500", 4, 0.6, 0.95, False
    ),
    "gsm8k": functools.partial(
        _maths,
        ("*gsm8k*", "*gsm8k*/test.*", "*grade*school*math*/test.jsonl"),
        "github.com/openai/grade-school-math",
        1,
        0.0,
        1.0,
        False,
    ),
    "livecodebench": functools.partial(_livecodebench, (None, None), None),
    "livecodebench_paper": functools.partial(_livecodebench, ("2024-10-01", "2025-02-28"), "v5"),
    "codeforces": _codeforces,
    "humaneval": _humaneval,
}
"""Suite -> what makes it. `livecodebench` takes every problem of its files, `livecodebench_paper` the
window that the GSPO paper names, 2024-10 to 2025-02, of release v5."""

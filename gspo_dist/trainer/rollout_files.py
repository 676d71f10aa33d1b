"""The rollouts of a checkpoint: finished ones of later steps with their rewards, and unfinished ones.

rollouts.json says what each is, columns.npz holds tokens, log-probs, versions and routes of all, end to end.
Prompts are not stored: the cursor hands them out again, or their places in the source are kept. 17 bytes a
token without routes, so 1,024 completions of 8,192 tokens are 143 MB.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from gspo_dist.candidates import Candidates
from gspo_dist.files import write_text
from gspo_dist.rewards.reward import Judged
from gspo_dist.routing.trace import RoutingTrace, id_dtype
from gspo_dist.trainer.buffer import Buffer
from gspo_dist.trainer.episodes import Episodes
from gspo_dist.trainer.pipeline import Collector
from gspo_dist.types import COLUMNS, Completion, Turn, Work, WorkKey

log = logging.getLogger(__name__)

ROWS_FILE, COLUMNS_FILE = "rollouts.json", "columns.npz"
FOLDER = "rollouts"


def save_rollouts(buffer: Buffer, folder: Path, episodes: Episodes | None = None) -> dict[str, Any]:
    """Writes the buffer's rollouts below a checkpoint's folder; returns what the manifest says of them.

    episodes: those under way, some of which wait for environments. Every engine must be empty. Nothing is
    written where no step is begun beyond the trained ones.
    """
    if not buffer.steps:
        return {}
    rows: list[dict[str, Any]] = []
    parts: list[Completion] = []
    for step in buffer.steps.values():
        for key, completion in step.finished.items():
            verdict = step.verdicts.get(key)
            rows.append(_row(key, step.prompt(key).token_ids, completion, verdict))
            parts.append(completion)
    acting = [episodes.live[key] for key in sorted(episodes.acting)] if episodes is not None else []
    for item in [*buffer.waiting, *acting]:
        if len(item.so_far):
            row = _row(item.key, item.prompt.token_ids, item.so_far, None)
            rows.append(row | _episode_row(item, episodes))
            parts.append(item.so_far)
    target = folder / FOLDER
    target.mkdir()
    write_text(target / ROWS_FILE, json.dumps(rows))
    np.savez(target / COLUMNS_FILE, **cast(Any, _columns(parts)))
    files = {name: (target / name).stat().st_size for name in (ROWS_FILE, COLUMNS_FILE)}
    drawn = {str(number): step.drawn for number, step in buffer.steps.items() if step.drawn}
    tries = {str(number): step.tries for number, step in buffer.steps.items() if step.drawn}
    return {
        **({"drawn": drawn, "tries": tries} if drawn else {}),
        "begun": buffer.begun,
        "finished": sum(len(s.finished) for s in buffer.steps.values()),
        "files": files,
    }


def _row(
    key: WorkKey, prompt: tuple[int, ...], completion: Completion, verdict: Judged | None
) -> dict[str, Any]:
    return {
        "group": key[0],
        "sample": key[1],
        "prompt": list(prompt),
        "finish_reason": completion.finish_reason,
        "text": completion.text,
        "verdict": None if verdict is None else [verdict.reward, dict(verdict.parts)],
        "experts": None if completion.routing is None else completion.routing.num_experts,
    } | ({"turns": [asdict(turn) for turn in completion.turns]} if completion.turns else {})


def _episode_row(item: Work, episodes: Episodes | None) -> dict[str, Any]:
    """What else an episode under way needs: whether it waits for its environment, and the state of that."""
    if episodes is None:
        return {}
    after, state = episodes.states.get(item.key, (0, None))
    return {"unfinished": True, "state": [after, state] if state is not None else None}


def _columns(parts: list[Completion]) -> dict[str, np.ndarray]:
    traces = [c.routing for c in parts if c.routing is not None]
    columns = {"counts": np.array([len(c) for c in parts], np.int64)}
    for name, dtype in COLUMNS.items():
        joined = np.concatenate([np.zeros(0, dtype), *(getattr(c, name) for c in parts)])
        columns[name] = joined.astype(dtype, copy=False)
    candidates = Candidates.join([(len(c), c.candidates) for c in parts])
    if candidates is not None:
        columns |= {"candidate_ids": candidates.ids, "candidate_logprobs": candidates.logprobs}
    if traces:
        columns["route_rows"] = np.array([len(t) for t in traces], np.int64)
        columns["expert_ids"] = np.concatenate([t.expert_ids for t in traces])
        columns["known"] = np.concatenate([t.known for t in traces])
    return columns


def load_rollouts(collector: Collector, folder: Path, entry: Mapping[str, Any]) -> None:
    """Begins the steps that the checkpoint had begun, and gives them what was sampled and judged.

    entry: what `save_rollouts` said. A group whose prompt was edited since begins anew, which is said.
    ValueError: a file is missing or torn, or the steps are of another size.
    """
    if not entry:
        return
    target = folder / FOLDER
    for name, size in entry["files"].items():
        path = target / name
        got = path.stat().st_size if path.is_file() else None
        if got != size:
            raise ValueError(
                f"checkpoint {folder} must have its rollouts whole: {FOLDER}/{name} "
                f"{'is missing' if got is None else f'has {got} of {size} bytes'}"
            )
    buffer = collector.buffer
    while buffer.begun < entry["begun"]:
        number = str(buffer.begun + 1)
        drawn = entry.get("drawn", {}).get(number)
        if drawn and max(drawn) < collector.cursor.size:
            begun = collector.begin_with(collector.cursor.prompts(drawn), drawn)
            begun.tries = entry["tries"][number]
        else:
            collector.begin()
    rows = json.loads((target / ROWS_FILE).read_text(encoding="utf-8"))
    edited: set[int] = set()
    so_far: dict[WorkKey, Completion] = {}
    for row, completion in zip(rows, _completions(rows, target / COLUMNS_FILE), strict=True):
        key = row["group"], row["sample"]
        step = buffer.step_of(key)
        if step is None or key[1] >= step.spec.n:
            raise ValueError(
                f"checkpoint {folder} has rollouts of steps of another size (completion {key[1]} of group "
                f"{key[0]}): restore rollout.prompts_per_step and rollout.group_size, or start a new run_dir"
            )
        if list(step.prompt(key).token_ids) != row["prompt"]:
            edited.add(key[0])
        elif row["finish_reason"] and not row.get("unfinished"):
            step.finished[key] = completion
            if row["verdict"] is not None:
                step.verdicts[key] = Judged(*row["verdict"])
        else:
            so_far[key] = completion
            if collector.episodes is not None and row.get("state") is not None:
                collector.episodes.states[key] = row["state"][0], row["state"][1]
    buffer.go_on(so_far)
    if edited:
        log.warning("%d group(s) begin anew: their prompts were edited since the checkpoint", len(edited))


def _completions(rows: list[dict[str, Any]], path: Path) -> list[Completion]:
    with np.load(path) as columns:
        data = {name: columns[name] for name in columns.files}
    cuts = np.cumsum(data["counts"])[:-1]
    split = {name: np.split(data[name], cuts) for name in COLUMNS}
    candidates: list[Candidates | None] = [None] * len(rows)
    if "candidate_ids" in data:
        both = (np.split(data[name], cuts) for name in ("candidate_ids", "candidate_logprobs"))
        candidates = [Candidates(ids, logprobs) for ids, logprobs in zip(*both, strict=True)]
    traces = iter(_traces(data))
    out = []
    for i, row in enumerate(rows):
        routing = None
        if row["experts"] is not None:
            ids, known = next(traces)
            routing = RoutingTrace(ids.astype(id_dtype(row["experts"])), known, row["experts"])
        own = {name: arrays[i] for name, arrays in split.items()}
        turns = tuple(Turn(**turn) for turn in row.get("turns", ()))
        reason, text = row["finish_reason"], row["text"]
        out.append(
            Completion(
                **own,
                finish_reason=reason,
                text=text,
                routing=routing,
                turns=turns,
                candidates=candidates[i],
            )
        )
    return out


def _traces(data: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    if "route_rows" not in data:
        return []
    cuts = np.cumsum(data["route_rows"])[:-1]
    return list(zip(np.split(data["expert_ids"], cuts), np.split(data["known"], cuts), strict=True))

"""What a checkpoint keeps of begun rollouts comes back as it was, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from gspo_dist.candidates import Candidates
from gspo_dist.trainer.buffer import Buffer
from gspo_dist.trainer.rollout_files import load_rollouts, save_rollouts
from gspo_dist.types import COLUMNS, Turn
from tests.unit.trainer.small import rollout, trace
from tests.unit.trainer.test_pipeline import SAMPLING, Pool, begun_at, collector_of, trained

DONE, LATE, OPEN = (3, 0), (4, 0), (5, 1)
"""Of step 2: finished and judged, finished and not judged yet, unfinished."""


@pytest.fixture
def saved(tmp_path):
    """(collector, what the manifest says) after step 1: of step 2, samples 0 are finished, and samples 1 have
    10 of 30 tokens. DONE and OPEN have routes.
    """
    collector = collector_of(
        Pool(lambda group, sample: 1 if group < 3 else 9 + 21 * sample), steps_ahead=1, ticks_per_step=2
    )
    trained(collector, [1])
    step, waiting = collector.buffer.steps[2], collector.buffer.waiting
    del step.verdicts[LATE]
    step.finished[DONE] = replace(step.finished[DONE], routing=trace(2 + 9, 3))
    at = [item.key for item in waiting].index(OPEN)
    likeliest = Candidates(np.arange(20, dtype=np.int32).reshape(10, 2), np.full((10, 2), -0.5, np.float32))
    so_far = replace(waiting[at].so_far, routing=trace(2 + 10, 5), candidates=likeliest)
    waiting[at] = replace(waiting[at], so_far=so_far)
    assert {len(item.so_far) for item in waiting} == {10}
    return collector, json.loads(json.dumps(save_rollouts(collector.buffer, tmp_path)))


def facts(completion):
    """All that a completion holds, as values that compare."""
    columns = {name: getattr(completion, name) for name in COLUMNS}
    trace = completion.routing
    return (
        {name: (column.dtype, column.tolist()) for name, column in columns.items()},
        completion.finish_reason,
        completion.text,
        completion.candidates is not None
        and np.isfinite(completion.candidates.logprobs).any()
        and (completion.candidates.ids.tolist(), completion.candidates.logprobs.tolist()),
        trace
        and (trace.expert_ids.dtype, trace.expert_ids.tolist(), trace.known.tolist(), trace.num_experts),
    )


def resumed():
    return begun_at(collector_of(steps_ahead=1), 2)


def test_episodes_come_back_with_their_turns_and_their_environments_states(saved, tmp_path):
    """OPEN has ended a turn, so its reason to end is that turn's, and it waits for its environment."""
    collector, _ = saved
    waiting = collector.buffer.waiting
    at = [item.key for item in waiting].index(OPEN)
    turns = (Turn(0, 0, 0, "", "go"), Turn(0, 10, 10, "said", "", 0.5))
    so_far = replace(waiting[at].so_far, turns=turns, finish_reason="stop")
    waiting[at] = replace(waiting[at], so_far=so_far)
    collector.buffer.waiting = [item for item in waiting if item.key != OPEN]
    episodes = SimpleNamespace(acting={OPEN}, live={OPEN: waiting[at]}, states={OPEN: (1, '{"n": 2}')})
    shutil.rmtree(tmp_path / "rollouts")
    entry = save_rollouts(collector.buffer, tmp_path, episodes)
    for episodes in (SimpleNamespace(states={}), None):
        again = resumed()
        again.episodes = episodes
        load_rollouts(again, tmp_path, entry)
        assert [item.key for item in again.buffer.waiting] == [(3, 1), (4, 1), (5, 1)]
        assert [item.so_far.turns for item in again.buffer.waiting] == [(), (), turns]
        assert all(c.turns == () for c in again.buffer.steps[2].finished.values())
        assert episodes is None or episodes.states == {OPEN: (1, '{"n": 2}')}


@pytest.mark.parametrize(
    ("size", "prompts", "tries"), [(10, ["p7", "p2", "p9"], 4), (9, ["p3", "p4", "p5"], 1)]
)
def test_drawn_prompts_are_drawn_again_by_their_places_while_the_source_has_them(
    saved, tmp_path, size, prompts, tries
):
    """A source that was cut short since hands out what its cursor has next. Those groups begin anew."""
    collector, entry = saved
    assert not entry.keys() & {"drawn", "tries"}
    collector.buffer.steps[2].drawn, collector.buffer.steps[2].tries = [7, 2, 9], 4
    shutil.rmtree(tmp_path / "rollouts")
    entry = json.loads(json.dumps(save_rollouts(collector.buffer, tmp_path)))
    again = resumed()
    again.cursor.size = size
    again.cursor.prompts = lambda places: [rollout(i).prompt for i in places]
    load_rollouts(again, tmp_path, entry)
    step = again.buffer.steps[2]
    assert ([prompt.prompt_id for prompt in step.prompts], step.tries) == (prompts, tries)


def test_all_comes_back_as_it_was(saved, tmp_path):
    collector, entry = saved
    again = resumed()
    load_rollouts(again, tmp_path, entry)
    was, now = collector.buffer, again.buffer
    assert (now.begun, list(now.steps)) == (2, [2])
    assert {key: facts(c) for key, c in now.steps[2].finished.items()} == {
        key: facts(c) for key, c in was.steps[2].finished.items()
    }
    assert now.steps[2].verdicts == was.steps[2].verdicts
    assert set(now.steps[2].verdicts) == {DONE, (5, 0)}
    assert [item.key for item in now.waiting] == [(3, 1), (4, 1), (5, 1)]
    assert [facts(item.so_far) for item in now.waiting] == [facts(item.so_far) for item in was.waiting]


def test_rollouts_without_routes_come_back_without(tmp_path):
    collector = collector_of(Pool(lambda group, sample: 1 if group < 3 else 9), steps_ahead=1)
    collector.sample(1)
    collector.judged(1)
    collector.pause()
    again = resumed()
    load_rollouts(again, tmp_path, save_rollouts(collector.buffer, tmp_path))
    was, now = ([facts(item.so_far) for item in c.buffer.waiting] for c in (collector, again))
    assert now == was
    assert {(len(item.so_far), item.so_far.routing) for item in again.buffer.waiting} == {(3, None)}


def test_a_group_whose_prompt_was_edited_begins_anew(saved, tmp_path, caplog):
    again = resumed()
    plain = again.cursor.next
    again.cursor.next = lambda n: [
        replace(prompt, token_ids=(8, 9)) if prompt.prompt_id == "p3" else prompt for prompt in plain(n)
    ]
    load_rollouts(again, tmp_path, saved[1])
    assert sorted(again.buffer.steps[2].finished) == [LATE, (5, 0)]
    assert {item.key: len(item.so_far) for item in again.buffer.waiting} == {
        (3, 0): 0,
        (3, 1): 0,
        (4, 1): 10,
        (5, 1): 10,
    }
    assert "1 group(s) begin anew: their prompts were edited" in caplog.text


def test_a_torn_or_a_missing_file_is_told(saved, tmp_path):
    path = tmp_path / "rollouts" / "columns.npz"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"rollouts/columns\.npz has {size - 1} of {size} bytes$"):
        load_rollouts(resumed(), tmp_path, saved[1])
    path.unlink()
    with pytest.raises(ValueError, match=r"rollouts/columns\.npz is missing$"):
        load_rollouts(resumed(), tmp_path, saved[1])


def test_steps_of_another_size_are_refused(saved, tmp_path):
    again = resumed()
    again.spec_of = lambda step: replace(SAMPLING, n=1)
    with pytest.raises(
        ValueError, match=r"of another size \(completion 1 of group 3\): restore rollout\.pro"
    ):
        load_rollouts(again, tmp_path, saved[1])


def test_where_nothing_is_begun_nothing_is_written(tmp_path):
    assert save_rollouts(Buffer(), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []
    again = resumed()
    load_rollouts(again, tmp_path, {})
    assert again.buffer.steps == {}

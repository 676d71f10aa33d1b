"""One Ray for all tests of the actors, and one that is not real."""

from __future__ import annotations

import pytest

from gspo_dist.actors import everywhere, learner_group, process, reward_pool, rollout_pool, weight_link
from gspo_dist.actors.session import start_ray, stop_ray
from gspo_dist.config import ClusterConfig
from tests.unit.actors.virtual_ray import VirtualRay


@pytest.fixture(scope="session")
def ray_here():
    """Ray on this host; the value says that this call has started it."""
    yield start_ray(ClusterConfig())
    stop_ray()


@pytest.fixture
def world(monkeypatch) -> VirtualRay:
    """Ray and the clock of all modules that wait for actors."""
    world = VirtualRay()
    world.stand_in(monkeypatch, process, rollout_pool, reward_pool, learner_group, everywhere, weight_link)
    return world

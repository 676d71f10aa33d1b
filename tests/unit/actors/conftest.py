"""One Ray for all tests of the actors."""

from __future__ import annotations

import pytest

from gspo_dist.actors.session import start_ray, stop_ray
from gspo_dist.config import ClusterConfig


@pytest.fixture(scope="session")
def ray_here():
    """Ray on this host; the value says that this call has started it."""
    yield start_ray(ClusterConfig())
    stop_ray()

"""A short campaign: one round of the brief episodes of `make chaos`, each with every invariant."""

from __future__ import annotations

import random

import pytest
from campaign_episodes import BRIEF, EPISODES

SEED = f"test-{random.randrange(10**6)}"  # another one each time; a failure names it


@pytest.mark.parametrize("name", BRIEF)
def test_every_invariant_holds_in(name):
    world = EPISODES[name](SEED)
    assert not world.broken, world.report()[:20_000]
    assert world.faults, "the episode had no fault"
    assert world.checked["after quiet no run is active and no load is left"] == 1
    world.close()

"""The store of made answers: bounded, whole after a checkpoint; and what is called a collapse."""

from __future__ import annotations

import numpy as np
import pytest

from compress.errors import TrainingError
from compress.model.distillation.replay import Health, Replay, health, packed, unpacked
from compress.model.distillation.rollouts import Rollout

STOP = 4
ROLLOUTS = [
    Rollout(i, tuple(range(5, 10 + i)), 2, tuple(-0.1 * j for j in range(3 + i)), i % 2 == 0, i) for i in range(9)
]


def test_the_oldest_leave():
    replay = Replay(5)
    replay.add(ROLLOUTS[:3])
    replay.add(ROLLOUTS[3:])
    assert [made.row for made in replay.rows] == [4, 5, 6, 7, 8]
    none = Replay(0)
    none.add(ROLLOUTS)
    assert len(none) == 0


def test_draws_follow_the_generator_and_hold_to_the_tokens():
    replay = Replay(100)
    replay.add(ROLLOUTS)
    drawn = [replay.draw(np.random.default_rng(seed), 30) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(0 < sum(len(made.ids) for made in rows) <= 30 for rows in drawn)
    assert len(replay.draw(np.random.default_rng(1), 1)) == 1
    assert len({made.row for made in replay.draw(np.random.default_rng(1), 10**6)}) == len(ROLLOUTS)


@pytest.mark.parametrize("count", [0, 1, 9])
def test_packing_gives_back_every_bit(count):
    assert unpacked(packed(ROLLOUTS[:count])) == ROLLOUTS[:count]


def test_health_by_hand():
    found = health([(STOP,), (5, 6, 5, 6, STOP), (7, 7, 7, 7), (8, STOP)], [STOP])
    assert found == {"empty": 0.25, "endless": 0.25, "repeated": pytest.approx(3 / 8)}
    assert health([], [STOP]) == {"empty": 0.0, "endless": 0.0, "repeated": 0.0}


USUAL = {"empty": 0.0, "endless": 0.0, "repeated": 0.1}
TEXTS = {"empty": "are empty", "endless": "run into the limit", "repeated": "stood there before"}


@pytest.mark.parametrize("name", TEXTS)
def test_collapse_is_told_and_stops_where_asked(name, caplog):
    for stop in (False, True):
        watch = Health(USUAL, where="run", stop=stop)
        watch.see(1, USUAL)
        watch.see(2, USUAL | {name: 1.0})  # one odd round
        assert watch.notes() == []
        bad = USUAL | {name: 1.0}
        if not stop:
            for step in range(3, 12):
                watch.see(step, bad)
            assert TEXTS[name] in watch.notes()[0]
            assert caplog.text.count("degenerates") == 1
            fresh = Health(USUAL, where="run", stop=True)
            fresh.restore(watch.state())
            assert fresh.notes() == watch.notes()
            for step in range(12, 20):
                watch.see(step, USUAL)
            assert watch.notes() == []
        else:
            with pytest.raises(TrainingError, match=f"degenerates: since step .*{TEXTS[name]}.*Lower learning_rate"):
                assert [watch.see(step, bad) for step in range(3, 12)] == []


def test_texts_that_never_end_are_no_collapse():
    watch = Health(USUAL | {"endless": 1.0}, where="run", stop=True)
    for step in range(20):
        watch.see(step, USUAL | {"endless": 1.0})
    assert watch.notes() == []

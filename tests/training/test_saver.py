"""When a checkpoint that failed is tried again; the storage is played."""

import logging

import pytest

from rwkvx_jax.checkpoint_store import CheckpointFailed, NotWritten
from rwkvx_jax.training import saver
from rwkvx_jax.training.saver import Saver

REFUSED = NotWritten("no checkpoint could be written to gs://b: refused")


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Storage:
    """Stands for `Checkpoints`: `down` refuses, `slow` never ends a write."""

    def __init__(self):
        self.down, self.slow, self.saved, self.pending = False, False, [], None

    def save(self, step, *_):
        assert self.pending is None, "Orbax would wait here"
        if self.down:
            raise REFUSED
        self.pending = step

    def writing(self):
        return self.pending is not None and self.slow

    def wait(self):
        step, self.pending = self.pending, None
        if step is not None and self.down:
            raise REFUSED
        if step is not None:
            self.saved.append(step)

    def begin_anew(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(saver, "time", clock)
    return clock


@pytest.fixture
def storage(monkeypatch):
    storage = Storage()

    def asked(act, *_):
        future = saver.Future()
        future.set_exception(OSError("gs://b: refused")) if storage.down else future.set_result(0)
        return future

    monkeypatch.setattr(saver, "_in_background", asked)
    return storage


def train(saving, storage, clock, steps, act=lambda step: None):
    """A step a second, a checkpoint due after every 5."""
    for step in steps:
        act(step)
        clock.now += 1
        if step % 5 == 0 or saving.retry_due():
            saving.save(step, {}, {}, {}, wait=False)


def test_an_outage_is_outlived(storage, clock, caplog):
    saving = Saver(storage, None, 60)

    def act(step):
        storage.down = 9 <= step < 22

    with caplog.at_level(logging.WARNING):
        train(saving, storage, clock, range(1, 41), act)
        saving.save(41, {}, {}, {}, wait=True)
    before, after = [s for s in storage.saved if s < 9], [s for s in storage.saved if s >= 9]
    assert before == [5] and 22 < after[0] < 40 and after[-2:] == [40, 41]
    texts = [record.getMessage() for record in caplog.records]
    assert [t.partition("trying again ")[2] for t in texts[:3]] == ["in 2 s", "in 4 s", "in 8 s"]
    assert texts[-1] == "checkpoints can be written again"


def test_patience_ends(storage, clock):
    saving = Saver(storage, None, 20)
    storage.down = True
    with pytest.raises(CheckpointFailed, match="refused\nThat has failed .*patience is 20"):
        train(saving, storage, clock, range(1, 100))
    assert 120 < clock.now < 150
    with pytest.raises(CheckpointFailed, match="failed for 0 s"):
        Saver(storage, None, 0).save(1, {}, {}, {}, wait=False)


def test_the_last_one_is_tried_until_it_is_there(storage, clock, monkeypatch):
    storage.down = True

    def sleep(seconds):
        clock.now += seconds
        storage.down = clock.now < 110

    monkeypatch.setattr(clock, "sleep", sleep)
    Saver(storage, None, 60).save(7, {}, {}, {}, wait=True)
    assert storage.saved == [7] and clock.now < 120


def test_a_write_that_hangs_does_not_hold_training_up(storage, clock, caplog):
    saving = Saver(storage, None, 60)

    def act(step):
        storage.slow = 4 <= step < 18

    train(saving, storage, clock, range(1, 31), act)
    saving.save(31, {}, {}, {}, wait=True)
    assert storage.saved == [5, 18, 20, 25, 30, 31]
    assert sum("still being written" in r.getMessage() for r in caplog.records) == 1

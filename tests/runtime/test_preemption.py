import os
import signal

import pytest

from rst_jax.runtime import preemption


@pytest.fixture
def clock(monkeypatch):
    """Seconds that stand still."""
    now = [1000.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    yield now
    signal.signal(signal.SIGTERM, before)
    preemption.listen()
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("minutes", "works"), [(30, 29 * 60), (5, 240), (1, 48), (0, 0)])
def test_time_is_kept_for_stopping(clock, minutes, works):
    preemption.listen(minutes)
    clock[0] += works - 1e-3
    assert not preemption.asked()
    clock[0] += 2e-3
    assert preemption.asked()
    assert str(preemption.Preempted()) == f"stopped as the {minutes} minutes end"


def test_a_signal_is_remembered_until_the_next_command(clock):
    preemption.listen()
    clock[0] += 1e9
    assert not preemption.asked()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.asked()
    assert str(preemption.Preempted()) == "stopped by SIGTERM"
    preemption.listen(1)
    assert not preemption.asked()

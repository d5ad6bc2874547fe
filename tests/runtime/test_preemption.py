import contextlib
import os
import signal

import pytest

from rst_jax.runtime import preemption


@pytest.fixture
def clock(monkeypatch):
    """Seconds that stand still."""
    now = [1000.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield now
    preemption.catch(lambda error: None)  # forgets what came
    preemption.listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("minutes", "works"), [(30, 29 * 60), (5, 240), (1, 48), (0, 0)])
def test_time_is_kept_for_stopping(clock, minutes, works):
    preemption.listen(minutes)
    clock[0] += works - 1e-3
    assert not preemption.asked()
    clock[0] += 2e-3
    assert preemption.asked()
    assert str(preemption.Preempted()) == f"stopped as the {minutes} minutes end"


def test_a_signal_ends_at_once_what_holds_nothing_and_waits_where_a_folder_is_held(clock):
    ended = []
    preemption.catch(lambda error: ended.append(repr(error)))
    preemption.listen()
    clock[0] += 1e9
    for number in (signal.SIGTERM, signal.SIGINT):
        with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext():
            os.kill(os.getpid(), number)
    assert ended == ["Preempted('stopped by SIGTERM')", "KeyboardInterrupt()"]
    preemption.catch(lambda error: ended.append(repr(error)))
    with preemption.remembered():
        assert not preemption.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.asked()
    assert len(ended) == 2
    assert str(preemption.Preempted()) == "stopped by SIGTERM"


def test_ctrl_c_that_something_swallows_is_answered_at_the_next_place_and_a_second_one_at_once(clock):
    ended = []
    preemption.catch(lambda error: ended.append(repr(error)))
    with preemption.remembered():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            preemption.asked()
        assert not ended
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert ended == ["KeyboardInterrupt()"]


def test_a_signal_that_the_process_is_to_ignore_stays_ignored(clock):
    """As a shell starts what runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    preemption.catch(lambda error: None)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN

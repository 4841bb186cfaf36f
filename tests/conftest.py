"""Fixtures and the hypothesis profile that all tests share."""

import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import moe_numba
from moe_numba import threads

_unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("quick", _unhurried, max_examples=30)
#: Without the JIT a case takes a hundred times as long. The same ones in every run: lines are counted there, of which
#: random ones meet 98 % in most runs, and in one met 94 %.
settings.register_profile("plain", _unhurried, max_examples=50, derandomize=True)
#: By hand: docs/reliability.md.
settings.register_profile("long", _unhurried, max_examples=2000)
settings.load_profile("quick")


@pytest.fixture
def rng():
    """A random generator that starts the same in every test."""
    return np.random.default_rng(1)


@pytest.fixture(autouse=True)
def _same_thread_count_afterwards():
    """A test may call set_num_threads; the next one starts with all threads again."""
    before = moe_numba.get_num_threads()
    yield
    moe_numba.set_num_threads(before)


@pytest.fixture
def signals_are_heard():
    """Children inherit which signals are ignored, and tests may run under `nohup` or in the background of a script."""
    ignored = [n for n in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def always_parallel(monkeypatch):
    """Kernels run on all threads however little there is to do."""
    monkeypatch.setattr(threads, "SERIAL_BELOW", 0)

"""perf/scaling.py."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.jit

PERF = Path(__file__).resolve().parent.parent / "perf"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(PERF)
    import scaling

    return scaling


def test_every_line_has_its_law(scaling):
    for _, lines, law in scaling.tables(all_threads=2):
        assert len(lines) == len(law)
        assert all(len(case) == 6 for _, case in lines)


def test_times_are_divided_by_the_law(scaling, monkeypatch, capsys):
    lines = [(f"T={n}", (n, 1, 2, 16, 8, 1)) for n in (2, 4)]
    monkeypatch.setattr(scaling, "tables", lambda all_threads: [("tokens", lines, (2, 4))])
    monkeypatch.setattr(scaling, "measure", lambda cases, rounds: [0.001, 0.003])
    scaling.main(["--rounds", "1"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[-2:]] == [["T=2", "1.000", "1.00"], ["T=4", "3.000", "1.50"]]


def test_cases_are_measured(scaling):
    seconds = scaling.measure([scaling.case(3, 1, 2, 16, 8, 1)], rounds=1)
    assert 0 < seconds[0] < 1

"""Bars appear for what takes long in a terminal, and lines in a log."""

from __future__ import annotations

import io

from rich.console import Console

import headstart.progress as progress


def drawn(monkeypatch, *, terminal, seconds, above=tuple):
    clock = iter(range(0, 1000 * seconds, seconds)) if seconds else iter([0] * 100)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with progress.progress_bars(Console(file=stream, force_terminal=terminal, width=100), above) as show:
        show("reading data", 3, 10)
        show("reading data", 10, 10)
        show("factorising", 1, 2)
    return stream.getvalue()


def test_bars_after_a_second(monkeypatch):
    text = drawn(monkeypatch, terminal=True, seconds=2)
    assert "reading data" in text
    assert "10/10" in text
    assert "factorising" in text


def test_nothing_for_what_is_quick(monkeypatch):
    assert drawn(monkeypatch, terminal=True, seconds=0) == ""


def told(monkeypatch, *calls):
    """Return the lines that a log gets, of (seconds since the beginning, step, done, total)."""
    stream = io.StringIO()
    with progress.progress_bars(Console(file=stream, force_terminal=False)) as show:
        for seconds, step, done, total in calls:
            monkeypatch.setattr(progress.time, "monotonic", lambda seconds=seconds: float(seconds))
            show(step, done, total)
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_after_half_a_minute(monkeypatch):
    calls = [(second, "training\tloss 0.5", second, 200) for second in range(90)]
    assert told(monkeypatch, *calls) == [
        "training: 30 of 200 after 0:30, about 2:50 left; loss 0.5",
        "training: 60 of 200 after 1:00, about 2:20 left; loss 0.5",
    ]


def test_lines_of_a_long_step_get_rare(monkeypatch):
    lines = told(monkeypatch, *((60 * minute, "training", minute, 600) for minute in range(601)))
    assert 60 < len(lines) < 110
    assert lines[-1].startswith("training: 5")


def test_what_goes_on_counts_its_own_steps_for_the_time_left(monkeypatch):
    lines = told(monkeypatch, (0, "training", 900, 1000), (50, "training", 950, 1000))
    assert lines == ["training: 950 of 1000 after 0:50, about 0:50 left"]


def test_a_step_that_begins_again_is_timed_anew(monkeypatch):
    calls = [(0, "training", 1, 9), (29, "training", 9, 9), (29, "training", 1, 9), (89, "training", 4, 9)]
    assert told(monkeypatch, *calls) == ["training: 4 of 9 after 1:00, about 1:40 left"]


def test_no_line_for_what_is_quick(monkeypatch):
    assert told(monkeypatch, *((second, "reading data", second, 29) for second in range(30))) == []


def test_what_fills_is_shown_above_the_bars(monkeypatch):
    table = ["the table as it is"]
    text = drawn(monkeypatch, terminal=True, seconds=2, above=lambda: table)
    assert "the table as it is" in text and "reading data" in text

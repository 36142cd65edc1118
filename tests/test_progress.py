"""Bars appear for what takes long, in a terminal only."""

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


def test_nothing_where_there_is_no_terminal(monkeypatch):
    assert "reading" not in drawn(monkeypatch, terminal=False, seconds=2)


def test_what_fills_is_shown_above_the_bars(monkeypatch):
    table = ["the table as it is"]
    text = drawn(monkeypatch, terminal=True, seconds=2, above=lambda: table)
    assert "the table as it is" in text and "reading data" in text

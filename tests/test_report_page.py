"""The report of studies whose results are made up: its answer, its tables, its page, and the page in a browser."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fake_study import BASE, fake_study, with_items
from headstart.errors import HeadstartError
from headstart.evaluation.figures import Figure
from headstart.reports import pictures
from headstart.reports.answer import answer
from headstart.reports.charts import charts
from headstart.reports.document import check_plotly
from headstart.reports.page import page, write_page
from headstart.reports.tables import markdown, ranking_table
from headstart.reports.words import rate_text, with_interval

RATES = [1e-4, 1e-3, 1e-2]
HOSTILE = "</script><img src=x onerror=alert(1)>|`*"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def losses(best, spread=0.001):
    """Return the truth of a study: each start's loss at 1e-3, and 0.5 more at the rates beside it."""
    return lambda cell: best[cell.start] + 0.5 * (cell.rate != 1e-3) + spread * cell.seed * len(cell.start)


def study(folder, best, **settings):
    axes = {"start": list(best), "optimizer.lr": RATES}
    return fake_study(folder, losses(best), axes, **{"seeds": 3, **settings})


def test_answer_tells_the_best_start_apart(tmp_path):
    said = answer(study(tmp_path, {"lora": 2.0, "pissa": 1.5}))
    assert said.startswith("pissa at its best rate 1e-3 has the lowest held-out loss, 1.5050: 0.4990 below lora (95 %")
    assert "paired t over 3 seeds" in said
    assert "and is told apart from it. The start of pissa takes 0.50 s (5 % of" in said
    assert said.count(". ") == 1


def test_answer_where_nothing_is_told_apart(tmp_path):
    def truth(cell):
        return 2.0 + 0.5 * (cell.rate != 1e-3) + (0.1 * cell.seed if cell.start == "lora" else 0.15 - 0.1 * cell.seed)

    said = answer(fake_study(tmp_path, truth, {"start": ["lora", "pissa"], "optimizer.lr": RATES}, seeds=3))
    assert said.startswith("No start is shown to be better than the reference lora: pissa at its best rate 1e-3 has")
    assert "and is not told apart from it" in said
    assert "interval of the difference -" in said


def test_answer_where_the_reference_is_best(tmp_path):
    said = answer(study(tmp_path, {"lora": 1.0, "pissa": 1.5, "milora": 3.0}))
    assert said.startswith("No start is better than the reference: lora at its best rate 1e-3 has the lowest")
    assert "next is pissa at its best rate 1e-3, 0.5010 above lora" in said
    assert "and is told apart from it." in said


def test_answer_says_what_is_unfinished(tmp_path):
    def truth(cell):
        if cell.seed == 2:
            return None if cell.start == "lora" else {"status": "failed", "reason": "out of memory"}
        return losses({"lora": 2.0, "pissa": 1.5})(cell)

    summary = fake_study(tmp_path, truth, {"start": ["lora", "pissa"], "optimizer.lr": RATES}, seeds=3)
    assert "of 18 cells 3 are unfinished and 3 are marked failed, so this may change." in answer(summary)
    assert "| failed | out of memory | 3 |" in markdown(summary)


def test_answers_without_an_answer(tmp_path):
    nothing = fake_study(tmp_path / "a", lambda cell: None, {"start": ["lora", "pissa"]})
    assert answer(nothing).startswith("No cell has finished yet, so there is no answer. Of 2 cells 2 are unfinished")
    diverged = fake_study(tmp_path / "b", lambda cell: {"status": "diverged"}, {"start": ["lora", "pissa"]})
    assert answer(diverged) == "Every start diverged at each of its rates, so there is no answer."
    alone = fake_study(tmp_path / "c", lambda cell: 1.25, {"start": ["lora"]})
    assert answer(alone).startswith("The study has one start: lora at the rate 1e-3 has a held-out loss of 1.2500.")
    for summary in (nothing, diverged, alone):
        assert markdown(summary)
        assert "<h2" in page(summary)
        assert ranking_table(summary)


def test_answer_over_settings(tmp_path):
    axes = {"start": ["lora", "pissa"], "optimizer.lr": RATES, "adapter.r": [4, 8, 16]}

    def truth(cell):
        return losses({"lora": 2.0, "pissa": 1.5 if cell.run.adapter.r < 16 else 2.5})(cell)

    said = answer(fake_study(tmp_path, truth, axes, seeds=3))
    assert said.startswith("pissa has the lowest held-out loss, each start at its own best rate, in 2 of 3 settings")
    assert "told apart from the reference lora as better in 2, most with r 4: 0.4990 below lora" in said


def test_best_rate_at_the_edge_is_marked(tmp_path):
    summary = fake_study(
        tmp_path, lambda cell: 1 - cell.rate + 0.01 * cell.seed, {"start": ["lora"], "optimizer.lr": RATES}, seeds=2
    )
    assert "the best rate of lora is the highest that was tried" in answer(summary)
    assert "| lora | 0.01 (high edge) | 2 |" in markdown(summary)


def test_one_run_each_has_the_columns_of_a_comparison(tmp_path):
    def truth(cell):
        figure = Figure(0.75 if cell.start == "pissa" else 0.5, 0.301, 0.954, 4)
        return {"end": 1.5 if cell.start == "pissa" else 2.0, "metrics": {"exact_match": figure}}

    summary = fake_study(tmp_path, truth, {"start": ["lora", "pissa"]})
    summary = with_items(tmp_path, summary, lambda cell: [1.0, 2.0, 3.0, 4.0 if cell.start == "lora" else 2.0])
    text = markdown(summary)
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("| start | rate"))
    assert head == "| start | rate | start loss | loss | difference to lora | Holm p | verdict | exact_match |"
    row = next(line for line in lines if line.startswith("| pissa |"))
    assert row.startswith("| pissa | 1e-3 | 5.0000 | 1.5000 ± 0.1000 | -0.5000 (")
    assert row.endswith("| not told apart | 0.7500 (0.3010 to 0.9540) |")
    assert "Differences are judged by: bootstrap over 4 items." in text
    assert next(line for line in lines if line.startswith("| lora | 100")) == (
        "| lora | 100 | 0.50 | 9.50 | 1.00 | 5 % | 1.00 GiB | 6 steps, 10.0 s |"
    )


def test_terminal_shows_names_as_they_are(tmp_path):
    axes = {"start": ["lora", {"start": "pissa", "label": "[bold]x[/bold]"}]}
    summary = fake_study(tmp_path, lambda cell: 1.0, axes)
    console = Console(file=io.StringIO(), width=120)
    for shown in ranking_table(summary):
        console.print(shown)
    assert "[bold]x[/bold]" in console.file.getvalue()


def test_markdown_keeps_its_columns_whatever_names_hold(tmp_path):
    axes = {"start": ["lora", {"start": "pissa", "label": HOSTILE}], "optimizer.lr": RATES}
    lines = markdown(fake_study(tmp_path, lambda cell: 1 + cell.rate, axes)).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert any(r"\</script\>\<img src=x onerror=alert(1)\>\|\`\*" in line for line in tables)
    columns = 0
    for line, before in zip(lines, ["", *lines], strict=False):
        if line.startswith("|"):
            count = len(re.findall(r"(?<!\\)\|", line))
            assert count == columns or not before.startswith("|")
            columns = count


def test_words():
    assert [rate_text(rate) for rate in (2e-4, 1.25e-5, 0.001, 0.05)] == ["2e-4", "1.25e-5", "1e-3", "0.05"]
    assert with_interval(1.0, (0.5, 1.5)) == "1.0000 ± 0.5000"
    assert with_interval(-1.0, (-2.0, 0.5), sign=True) == "-1.0000 (-2.0000 to +0.5000)"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A study with everything: names that break out where they can, and cells of all kinds."""

    def truth(cell):
        if cell.rate == 1e-2 and cell.start == "pissa":
            return {"status": "diverged", "reason": HOSTILE}
        if cell.seed == 2 and cell.start == "init-ab:beta=2" and cell.rate == 1e-4:
            return {"status": "failed", "reason": HOSTILE}
        end = losses({"lora": 2.0, "pissa": 1.5, "init-ab:beta=2": 1.7, HOSTILE: 1.6})(cell)
        return {"end": end, "warnings": [HOSTILE]}

    starts = ["lora", "pissa", "init-ab:beta=2", {"start": "init-ab:beta=4", "label": HOSTILE}]
    axes = {"start": starts, "optimizer.lr": RATES, "adapter.r": [4, 8]}
    base = {**BASE, "model": HOSTILE}
    return fake_study(tmp_path_factory.mktemp("hostile"), truth, axes, base, seeds=3)


@pytest.fixture(scope="module")
def written(hostile):
    return page(hostile)


class Reader(HTMLParser):
    """What a page has: elements with their attributes, in order, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> ends nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append((self.elements[-1][1], data))


def test_page_is_well_formed_and_has_landmarks(written):
    read = Reader(written)
    assert read.open == []
    tags = [tag for tag, _, _ in read.elements]
    assert [tags.count(tag) for tag in ("html", "main", "h1", "header", "nav", "title")] == [1] * 6
    assert read.elements[0][1]["lang"] == "en"
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes, _ in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in read.elements:
        named = [attributes.get("aria-labelledby"), attributes.get("data-figure")]
        named += [attributes["href"][1:]] if attributes.get("href", "").startswith("#") else []
        assert all(name in ids for name in named if name)


def test_tables_and_charts_say_what_they_are(written):
    read = Reader(written)
    tags = [tag for tag, _, _ in read.elements]
    assert tags.count("caption") == tags.count("table") > 5
    assert all("scope" in attributes for tag, attributes, _ in read.elements if tag == "th")
    drawn = [attributes for _, attributes, _ in read.elements if attributes.get("class") == "chart"]
    assert len(drawn) == tags.count("figure") == tags.count("figcaption") > 5
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawn)
    regions = [attributes for _, attributes, _ in read.elements if "scroll" in attributes.get("class", "").split()]
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in regions)


def test_page_has_one_plotting_library_and_needs_no_network(written):
    from plotly.offline import get_plotlyjs

    read = Reader(written)
    code = [text for attributes, text in read.scripts if "type" not in attributes]
    assert len(code) == 2
    assert sum(len(text) > len(get_plotlyjs()) / 2 for text in code) == 1
    policy = next(attributes["content"] for _, attributes, _ in read.elements if attributes.get("http-equiv"))
    for text in code:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    for tag, attributes, _ in read.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), tag
    for attributes, text in read.scripts:
        if "type" in attributes:
            json.loads(text)


def test_nothing_of_the_study_breaks_out(written):
    read = Reader(written)
    assert not any(tag == "img" for tag, _, _ in read.elements)
    assert not any(name.startswith("on") for _, attributes, _ in read.elements for name in attributes)
    assert "<img" not in written.replace(open_plotly(), "")
    assert html.escape(HOSTILE) in written


def open_plotly():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_page_has_the_data_behind_each_chart(written):
    links = [attributes for tag, attributes, _ in Reader(written).elements if tag == "a" and "download" in attributes]
    assert "cells.csv" in {attributes["download"] for attributes in links}
    for attributes in links:
        text = base64.b64decode(attributes["href"].partition("base64,")[2]).decode()
        assert len(text.splitlines()) > 1
    rows = next(attributes for attributes in links if attributes["download"] == "cells.csv")
    assert len(base64.b64decode(rows["href"].partition("base64,")[2]).decode().splitlines()) == 1 + 4 * 3 * 2 * 3


def test_page_is_written_whole_and_needs_plotly(tmp_path, hostile, monkeypatch):
    write_page(tmp_path / "new" / "report.html", hostile)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(HeadstartError, match=r"headstart\[study\]"):
        check_plotly()
    with pytest.raises(HeadstartError):
        write_page(tmp_path / "report.html", hostile)
    assert not (tmp_path / "report.html").exists()


def test_pictures_say_what_they_need(tmp_path, hostile, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(pictures, "find_spec", lambda name: None if name == "kaleido" else found(name))
    assert 'pip install "headstart[pictures]"' in pictures.write_pictures(tmp_path / "pictures", charts(hostile))
    assert not (tmp_path / "pictures").exists()

    def no_browser(drawn, folder):
        (folder / f"{drawn[0].name}.png").write_bytes(b"half")
        raise RuntimeError("Kaleido requires Google Chrome")

    monkeypatch.setattr(pictures, "find_spec", lambda name: object())
    monkeypatch.setattr(pictures, "_draw", no_browser)
    assert "requires Google Chrome" in pictures.write_pictures(tmp_path / "pictures", charts(hostile))
    assert list((tmp_path / "pictures").iterdir()) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_page_in_a_browser(tmp_path, written):
    path = tmp_path / "report.html"
    path.write_text(written, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=60000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *options, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    elements = Reader(done.stdout[done.stdout.index("<html") :]).elements
    charts = [attributes for _, attributes, _ in elements if "chart" in attributes.get("class", "").split()]
    assert elements[0][1]["data-drawn"] == str(len(charts))
    drawn = [attributes for attributes in charts if attributes.get("data-drawn") == "yes"]
    # Those of the second setting are a click away, and have no size before.
    assert len(charts) > len(drawn) > 5
    assert sum(attributes.get("class") == "main-svg" for _, attributes, _ in elements) >= len(drawn)
    assert not any(tag == "img" for tag, _, _ in elements)

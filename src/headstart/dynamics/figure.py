"""What the toy experiment came to: figure 2 as charts and tables, and whether its claims hold, by their intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from headstart.dynamics.experiment import STARTS, Cell, Seed, Settings
from headstart.evaluation.intervals import CONFIDENCE
from headstart.reports.charts.chart import Chart, Row, band, curve, layout, rate_axis
from headstart.reports.charts.heat import heat_map
from headstart.reports.charts.training import averaged
from headstart.reports.colours import DIVERGING, SEQUENTIAL, look
from headstart.reports.findings import Findings
from headstart.reports.sheets import Sheet
from headstart.reports.words import counted, number, rate_text, with_interval
from headstart.study.differences import Difference, paired_over_seeds

ZERO, BOTH = STARTS
TITLE = "The toy model of non-zero initialisation"

_Key = tuple[str, float, float]


@dataclass(frozen=True)
class Figure:
    """The cells of all finished seeds, by start, deviation and rate, seeds in one order."""

    settings: Settings
    seeds: Sequence[Seed]
    cells: dict[_Key, list[Cell]]

    def losses(self, start: str, deviation: float, rate: float) -> list[float]:
        """Return the test loss of each seed."""
        return [cell.loss for cell in self.cells[start, deviation, rate]]

    def mean(self, start: str, deviation: float, rate: float) -> float:
        """Return the mean test loss."""
        return fmean(self.losses(start, deviation, rate))

    def over_seeds(self, start: str, deviation: float, rate: float) -> Difference:
        """Return the mean test loss with its interval."""
        return paired_over_seeds([(loss, 0.0) for loss in self.losses(start, deviation, rate)])

    def change(self, deviation: float, rate: float) -> Difference:
        """Return Init[AB]'s loss minus Init[A]'s, paired by seed."""
        return self.between((BOTH, deviation, rate), (ZERO, deviation, rate))

    def between(self, one: _Key, other: _Key) -> Difference:
        """Return the loss of one cell minus another's, paired by seed."""
        return paired_over_seeds(list(zip(self.losses(*one), self.losses(*other), strict=True)))

    def best(self, start: str, rates: Sequence[float]) -> _Key:
        """Return the cell of a start with the lowest mean loss at these rates."""
        pairs = [(deviation, rate) for deviation in self.settings.deviations for rate in rates]
        return min(((start, *pair) for pair in pairs), key=lambda key: self.mean(*key))


def gathered(settings: Settings, seeds: Sequence[Seed]) -> Figure:
    """Return the figure of these seeds, at least one."""
    cells: dict[_Key, list[Cell]] = {}
    for seed in seeds:
        for cell in seed.cells:
            cells.setdefault((cell.start, cell.deviation, cell.rate), []).append(cell)
    return Figure(settings, seeds, cells)


def answer(figure: Figure) -> str:
    """Return what the paper claims of its figure 2, and what these cells say."""
    settings, seeds = figure.settings, len(figure.seeds)
    lowest = min(settings.rates)
    at_lowest = figure.best(BOTH, [lowest]), figure.best(ZERO, [lowest])
    overall = figure.best(BOTH, settings.rates), figure.best(ZERO, settings.rates)
    words = []
    for where, (both, zero) in ((f"At the lowest rate, {rate_text(lowest)}", at_lowest), ("At any rate", overall)):
        difference = figure.between(both, zero)
        words.append(
            f"{where}, each at its own best size, {BOTH} ends at {_cell_text(figure, both)} and {ZERO} at "
            f"{_cell_text(figure, zero)}: {with_interval(difference.value, difference.interval, sign=True)}."
        )
    if seeds > 1:
        changes = [figure.change(*pair) for pair in _pairs(settings)]
        better = sum(change.interval is not None and change.interval[1] < 0 for change in changes)
        worse = sum(change.interval is not None and change.interval[0] > 0 for change in changes)
        words.append(
            f"At the same size and rate, {BOTH} is lower in {better} and higher in {worse} of {len(changes)} cells "
            f"beyond their {100 * CONFIDENCE:.0f} % intervals; were the two equal, some "
            f"{(1 - CONFIDENCE) * len(changes):.0f} would be by chance."
        )
    else:
        words.append("One seed has no intervals.")
    return " ".join(words)


def findings(figure: Figure) -> Findings:
    """Return the report."""
    *maps, over_rates, over_steps = charts(figure)
    return Findings(
        TITLE,
        f'figure 2 of "Beyond Zero Initialization", width {figure.settings.width}',
        answer(figure),
        (
            ("Loss by rate and size", maps, ()),
            ("By size of the start", (), (sheet(figure),)),
            ("Curves", (over_rates, over_steps), ()),
        ),
        conditions(figure),
    )


def charts(figure: Figure) -> list[Chart]:
    """Return the maps, and the curves over rates and over steps."""
    settings = figure.settings
    note = f"{counted(len(figure.seeds), 'seed')}; rows are standard deviations of what starts at random."
    maps = []
    for name, start in (("loss-a", ZERO), ("loss-ab", BOTH)):
        means = _by_deviation(settings, partial(figure.mean, start))
        maps.append(heat_map(name, f"Test loss of {start}", "test loss", "deviation", means, SEQUENTIAL, note))
    gains = _by_deviation(settings, lambda *pair: _gain(figure, *pair))
    title = f"How much lower the loss of {BOTH} is than {ZERO}'s, in per cent"
    maps.append(heat_map("improvement", title, "improvement in per cent", "deviation", gains, DIVERGING, note))
    return [*maps, _over_rates(figure), _over_steps(figure)]


def sheet(figure: Figure) -> Sheet:
    """Return, for each deviation, both starts at the lowest rate and at the best one."""
    settings = figure.settings
    lowest, rows = min(settings.rates), []
    for deviation in settings.deviations:
        low = figure.change(deviation, lowest)
        row = [rate_text(deviation)]
        row += [number(figure.mean(start, deviation, lowest)) for start in STARTS]
        row.append(with_interval(low.value, low.interval, sign=True))
        for start in STARTS:
            rate = min(settings.rates, key=partial(figure.mean, start, deviation))
            row.append(f"{number(figure.mean(start, deviation, rate))} at {rate_text(rate)}")
        rows.append(tuple(row))
    at = f"at {rate_text(lowest)}"
    heads = ("deviation", *(f"{start} {at}" for start in STARTS), f"difference {at}", *(f"{s} at best" for s in STARTS))
    caption = (
        f"Mean test loss over {counted(len(figure.seeds), 'seed')}; ± is the 95 % interval of the difference, paired "
        "by seed, not corrected for the number of rows. The best rates are those of these very losses."
    )
    return Sheet(caption, heads, rows, frozenset())


def conditions(figure: Figure) -> list[tuple[str, str]]:
    """Return what the figure depends on, in words."""
    settings = figure.settings
    pretrained = "one model for all seeds" if settings.pretrain == "once" else "one model a seed"
    before = fmean(seed.before for seed in figure.seeds)
    of = "all images" if settings.test_images is None else f"{settings.test_images:,} images"
    return [
        (
            "model",
            f"W_out relu((W_0 + BA) relu(W_in x)), n = {settings.width}, r = {settings.rank}; pixels from 0 to 1",
        ),
        (
            "pretraining",
            f"{settings.pretrain_steps:,} steps of AdamW at {rate_text(settings.pretrain_rate)}, {pretrained}",
        ),
        ("fine-tuning", f"{settings.steps} steps of {settings.batch} images, AdamW; A0 B0 is not subtracted"),
        ("measured", f"mean cross-entropy of {of} of the test part; {number(before)} before fine-tuning"),
        ("seeds", f"{len(figure.seeds)} of {settings.seeds}"),
    ]


def _over_rates(figure: Figure) -> Chart:
    """Return loss over rates of both starts, at a small size and at the one that is best of all."""
    settings = figure.settings
    best = figure.best(BOTH, settings.rates)[1]
    small, rates = min(settings.deviations), sorted(settings.rates)
    traces, rows = [], []
    styles = iter(range(2 * len(STARTS)))
    for deviation in dict.fromkeys((small, best)):
        for start in STARTS:
            name, style = f"{start}, deviation {rate_text(deviation)}", look(next(styles))
            made = [figure.over_seeds(start, deviation, rate) for rate in rates]
            ends = [mean.interval or (mean.value, mean.value) for mean in made]
            if len(figure.seeds) > 1:
                traces.append(band(name, rates, [low for low, _ in ends], [high for _, high in ends], style))
            traces.append(curve(name, rates, [mean.value for mean in made], style))
            rows += [(name, rate, mean.value, *end) for rate, mean, end in zip(rates, made, ends, strict=True)]
    drawn = layout("learning rate", "test loss", xaxis=rate_axis(rates))
    caption = "Mean over seeds, with 95 % intervals as bands: at the smallest deviation, and where Init[AB] is best."
    heads = ("start", "rate", "mean test loss", "low", "high")
    return Chart("rates", "rates", "Test loss over rates", caption, {"data": traces, "layout": drawn}, heads, rows)


def _over_steps(figure: Figure) -> Chart:
    """Return training losses at the lowest rate, where Init[AB] is best."""
    settings = figure.settings
    lowest = min(settings.rates)
    deviation = figure.best(BOTH, [lowest])[1]
    traces, rows, window = [], list[Row](), 1
    for place, start in enumerate(STARTS):
        series = [list(enumerate(cell.losses, 1)) for cell in figure.cells[start, deviation, lowest]]
        points, window = averaged(series)
        steps, style = [point[0] for point in points], look(place)
        if len(figure.seeds) > 1:
            traces.append(band(start, steps, [point[2] for point in points], [point[3] for point in points], style))
        traces.append(curve(start, steps, [point[1] for point in points], style, mode="lines"))
        rows += [(start, *point) for point in points]
    caption = (
        f"At rate {rate_text(lowest)} and deviation {rate_text(deviation)}; mean over seeds with a band from the least "
        f"to the greatest, each point the mean of {counted(window, 'step')}."
    )
    data = {"data": traces, "layout": layout("step", "training loss")}
    heads = ("start", "step", "mean", "least", "greatest")
    return Chart("steps", "training", "Convergence at the lowest rate", caption, data, heads, rows)


def _by_deviation(settings: Settings, value: Callable[[float, float], float]) -> dict[float, dict[float, float]]:
    return {deviation: {rate: value(deviation, rate) for rate in settings.rates} for deviation in settings.deviations}


def _gain(figure: Figure, deviation: float, rate: float) -> float:
    zero = figure.mean(ZERO, deviation, rate)
    return 100 * (zero - figure.mean(BOTH, deviation, rate)) / zero


def _pairs(settings: Settings) -> Iterator[tuple[float, float]]:
    return ((deviation, rate) for deviation in settings.deviations for rate in settings.rates)


def _cell_text(figure: Figure, key: _Key) -> str:
    _, deviation, rate = key
    return f"{number(figure.mean(*key))} (deviation {rate_text(deviation)}, rate {rate_text(rate)})"

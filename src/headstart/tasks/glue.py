"""Six tasks of GLUE (Wang et al. 2018, arXiv 1804.07461), with the benchmark's own metrics.

To test is the hub's validation split, as the labels of GLUE's test sets are not published. Files are read as GLUE
publishes them (tab-separated, without quotes), and as CoLA, SST-2 and STS-B come without a header.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from headstart.errors import DataError
from headstart.tasks.base import Example, Kind, Row, Task, text_of
from headstart.tasks.registry import register, variant


@dataclass(frozen=True)
class Glue(Task):
    """Base of GLUE's tasks.

    Attributes:
        form: "label" (default) for a model with a head for classes or a number; "text" for one that reads and writes
            text, in T5's words (Raffel et al. 2020, arXiv 1910.10683, appendix D), for sequence to sequence.
    """

    source: ClassVar[str] = "Wang et al. 2018, arXiv 1804.07461; nyu-mll/glue"
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "validation"}
    texts: ClassVar[tuple[tuple[str, ...], ...]] = (("sentence",),)
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    together: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 10
    needs: ClassVar[tuple[str, ...]] = ("sklearn", "scipy")

    form: Literal["label", "text"] = "label"

    @property
    def kind(self) -> Kind:
        """What the form says."""
        return "text" if self.form == "text" else "classification" if self.labels else "regression"

    def example(self, row: Row, context: Sequence[Row] = ()) -> Example:
        """Make an example of a row with the texts' and the label's fields, by any of their published names."""
        names = [next((name for name in names if name in row), names[0]) for names in self.texts]
        texts = [text_of(row, name) for name in names]
        label = self.label_in(row)
        if self.form == "label":
            return Example(texts[0], pair=texts[1] if len(texts) > 1 else None, label=label)
        told = " ".join(f"{names[0]}: {text.strip()}" for names, text in zip(self.texts, texts, strict=True))
        word = self.labels[int(label)] if self.labels else f"{round(label * 5) / 5:.1f}"
        return Example(f"{self.name.replace('-', '')} {told}", word, label=label, reference=word, choices=self.labels)

    def label_in(self, row: Row) -> float:
        """Return the class's number; raise DataError where GLUE hides it, as -1, or it is none."""
        field, value = _labelled(row)
        names = [str(number) for number in range(len(self.labels))]
        text = str(value).strip()
        if text not in (*names, *self.labels):
            raise DataError(f"field {field!r} is {value!r}, not one of {', '.join((*names, *self.labels))}.")
        return int(text) if text in names else self.labels.index(text)

    def prediction(self, output: str) -> float:
        """Return the number of the class that an answer names; NaN for none, which no label equals."""
        word = output.strip()
        return float(self.labels.index(word)) if word in self.labels else math.nan

    def score(self, predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
        """Return the metrics by scikit-learn and scipy; a prediction of NaN is a class of its own."""
        if not len(labels) or len(predictions) != len(labels):
            raise DataError(f"task {self.name!r}: there are {len(predictions)} predictions for {len(labels)} labels.")
        given, right = [float(number) for number in predictions], [float(number) for number in labels]
        if self.labels:
            given = [-1.0 if math.isnan(number) else number for number in given]
        return {metric: _score(metric, given, right) for metric in self.metrics}


# fmt: off
_PAIR = (("sentence1", "#1 String"), ("sentence2", "#2 String"))
variant(
    Glue, "cola", "CoLA: is the sentence grammatical.", hub="nyu-mll/glue:cola", files=("CoLA",), lm_eval="cola",
    columns=("source", "label", "mark", "sentence"), labels=("unacceptable", "acceptable"), metrics=("matthews",),
)
variant(
    Glue, "mrpc", "MRPC: do two sentences say the same.", hub="nyu-mll/glue:mrpc", files=("MRPC",), lm_eval="mrpc",
    texts=_PAIR, labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1"),
)
variant(
    Glue, "qnli", "QNLI: does the sentence hold the question's answer.", hub="nyu-mll/glue:qnli", files=("QNLI",),
    texts=(("question",), ("sentence",)), labels=("entailment", "not_entailment"), lm_eval="qnli",
)
variant(
    Glue, "rte", "RTE: does the second sentence follow from the first.", hub="nyu-mll/glue:rte", files=("RTE",),
    texts=_PAIR, labels=("entailment", "not_entailment"), lm_eval="rte",
)
variant(
    Glue, "sst-2", "SST-2: does a review like its film.", hub="nyu-mll/glue:sst2", files=("sst2", "SST-2"),
    columns=("sentence", "label"), labels=("negative", "positive"), lm_eval="sst2",
)
# fmt: on


@register("sts-b")
@dataclass(frozen=True)
class STSB(Glue):
    """STS-B: how alike two sentences are, from 0 to 5; T5 writes the nearest multiple of 0.2."""

    hub: ClassVar[str | None] = "nyu-mll/glue:stsb"
    columns: ClassVar[tuple[str, ...]] = ("sentence1", "sentence2", "label")
    texts: ClassVar[tuple[tuple[str, ...], ...]] = _PAIR
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")
    files: ClassVar[tuple[str, ...]] = ("stsb", "STS-B")

    def label_in(self, row: Row) -> float:
        """Return the score; raise DataError where it is none."""
        field, value = _labelled(row)
        if not re.fullmatch(r"[0-4](\.\d*)?|5(\.0*)?", str(value).strip()):
            raise DataError(f"field {field!r} is {value!r}, not a score from 0 to 5.")
        return float(str(value))

    def prediction(self, output: str) -> float:
        """Return the number that an answer is, and 0 where it is none."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", output)
        return float(match[1]) if match else 0.0


def _labelled(row: Row) -> tuple[str, object]:
    field = next((name for name in ("label", "Quality", "score") if name in row), "label")
    if field not in row:
        raise DataError("field 'label' is missing.")
    return field, row[field]


def _score(metric: str, predictions: Sequence[float], labels: Sequence[float]) -> float:
    from scipy import stats
    from sklearn import metrics

    if metric == "accuracy":
        return float(metrics.accuracy_score(labels, predictions))
    if metric == "matthews":
        return float(metrics.matthews_corrcoef(labels, predictions))
    if metric == "f1":
        return float(metrics.f1_score(labels, predictions, labels=[1], average="macro", zero_division=0))
    # scipy has no number for what is always the same; it goes with nothing, as Matthews' 0 says of classes.
    if len({*predictions}) < 2 or len({*labels}) < 2:
        return math.nan if any(map(math.isnan, predictions)) else 0.0
    correlation = stats.pearsonr if metric == "pearson" else stats.spearmanr
    return float(correlation(predictions, labels).statistic)

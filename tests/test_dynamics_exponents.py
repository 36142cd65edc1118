"""Exponents: fits of known powers, predictions against the paper's equations, and Theorem 1 by simulation."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.cli.app import main
from headstart.dynamics.exponents import (
    CLAIMS,
    TOLERANCE,
    Claim,
    answer,
    claims_sheet,
    exponents_sheet,
    findings,
    verdict,
)
from headstart.dynamics.starts import OneLayer, of_method
from headstart.dynamics.theory import (
    BOTH,
    LARGE,
    NOTHING,
    STARTS,
    ZERO_A,
    ZERO_B,
    Scheme,
    init,
    of_start,
    parsed,
    predicted,
    schemes,
)
from headstart.dynamics.widths import Scalar, Settings, Slope, Wide, fitted, gaussian, measure_all, measured, trained
from headstart.errors import MethodError, RunError
from headstart.methods import parse_method
from headstart.monitor import quantities
from headstart.reports.findings import as_markdown, as_page

POWERS = st.floats(-1.5, 0.5)
QUICK = Settings(widths=(256, 2048, 16384), seeds=6)
# The model of one layer has a loss of its own.
ONE_BY_ONE = pytest.mark.filterwarnings("ignore:the model's loss can't be computed from its logits")


@settings(max_examples=50, deadline=None)
@given(POWERS, st.floats(1e-3, 1e3), st.integers(0, 2**20))
def test_powers_that_are_known_are_found(power, constant, seed):
    generator = torch.Generator().manual_seed(seed)
    widths = (64, 256, 1024, 4096)
    exact = fitted(widths, [[constant * n**power for n in widths]] * 3)
    assert exact.value == pytest.approx(power, abs=1e-9)
    assert (exact.low, exact.high) == (pytest.approx(power, abs=1e-6), pytest.approx(power, abs=1e-6))
    noise = torch.exp(0.1 * torch.randn(40, len(widths), generator=generator)).tolist()
    curves = [[constant * n**power * factor for n, factor in zip(widths, row, strict=True)] for row in noise]
    slope = fitted(widths, curves)
    assert slope.low < slope.value < slope.high
    assert slope.value == pytest.approx(power, abs=0.05)
    assert slope.high - slope.low < 0.1


def test_intervals_of_slopes_hold_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    widths, inside = (64, 256, 1024), 0
    for _ in range(400):
        noise = torch.exp(0.3 * torch.randn(5, 3, generator=generator)).tolist()
        slope = fitted(widths, [[n**-0.5 * one for n, one in zip(widths, row, strict=True)] for row in noise])
        inside += slope.low <= -0.5 <= slope.high
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_what_is_zero_or_diverged_has_no_exponent(bad):
    assert fitted((1, 2, 4), [[1.0, 2.0, bad]]) is None


@settings(max_examples=200, deadline=None)
@given(POWERS, POWERS, POWERS, POWERS, st.integers(2, 6))
def test_predictions_are_equation_4s(a, b, rate_a, rate_b, steps):
    found = predicted(Scheme("any", a, b, rate_a, rate_b), steps, aligned=True)
    assert found.delta1 == pytest.approx(max(b, rate_b) + rate_a + 1)
    assert found.delta2 == pytest.approx(max(a, rate_a) + rate_b + 1)
    assert found.delta3 == pytest.approx(rate_a + rate_b + 1)
    assert found.z_b == pytest.approx(max(a, rate_a) + max(b, rate_b) + 1)
    assert found.z_a == pytest.approx(max(a, rate_a) + 1)
    # Drawn sums are smaller, and the same where what was trained is larger.
    drawn = predicted(Scheme("any", a, b, rate_a, rate_b), steps, aligned=False)
    assert drawn.z_a == pytest.approx(max(a + 0.5, rate_a + 1))
    assert drawn.delta1 == pytest.approx(found.delta1)
    assert drawn.delta2 <= found.delta2 + 1e-12


@pytest.mark.parametrize("rate", [-0.5, -0.6, -0.75, -1.0])
def test_theorem_1_in_the_papers_own_rules(rate):
    """A0, B0 of n^(-1/2): delta1 and delta2 fall as the rate does, and Z_B stays (section 3.3)."""
    found = predicted(init("both", -0.5, -0.5, rate), 3, aligned=True)
    assert (found.delta1, found.delta2, found.z_b) == pytest.approx((rate + 0.5, rate + 0.5, 0.0))
    zero = predicted(init("B = 0", -1.0, NOTHING, rate), 3, aligned=True)
    assert zero.delta1 == pytest.approx(2 * rate + 1)
    # Once an A0 that is drawn is as large as an aligned one of n^(-1/2), sums that cancel give the same.
    large = predicted(init("drawn", 0.0, -0.5, rate), 3, aligned=False)
    assert (large.delta1, large.delta2, large.z_b) == pytest.approx((rate + 0.5, rate + 0.5, 0.0))


def test_sgd_predictions_are_appendix_cs():
    found = predicted(init("equation 30", -0.75, -0.25, -0.5, "sgd"), 3, aligned=True)
    assert (found.delta1, found.delta2, found.z_b) == pytest.approx((0, 0, 0))
    lower = predicted(init("equation 31", -0.75, -0.25, -0.8, "sgd"), 3, aligned=True)
    assert (lower.delta1, lower.delta2, lower.z_b) == pytest.approx((-0.3, -0.3, 0))
    # Equation 29: what one step makes of a and b.
    one = predicted(init("b = 0", -0.75, NOTHING, -0.5, "sgd"), 2, aligned=True)
    assert one.z_b == pytest.approx(max(-0.5 - 0.75 + 1, NOTHING) - 0.75 + 1)


def test_lora_plus_is_stable_and_efficient_from_init_b():
    found = predicted(Scheme("Init[B]", NOTHING, 0.0, -1.0, 0.0, "lora+"), 3, aligned=True)
    assert (found.z_a, found.z_b, found.delta1, found.delta2) == (0, 0, 0, 0)


@pytest.mark.parametrize("made", [lambda z, base, out: Wide(z, base, out), lambda z, base, out: Scalar(z)])
def test_gradients_are_autograds(made):
    z, base, out = torch.randn(3, 12, dtype=torch.float64)
    layer = made(z, base, out)
    A = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    B = torch.randn(12 if isinstance(layer, Wide) else 1, 3, dtype=torch.float64, requires_grad=True)
    outputs = base + B @ A @ z if isinstance(layer, Wide) else B @ A @ z
    f = (out * outputs.relu()).mean() if isinstance(layer, Wide) else outputs
    loss = ((f - 1) ** 2 / 2).sum()
    loss.backward()
    assert layer.loss(A.detach(), B.detach()) == pytest.approx(loss.item())
    for gradient, factor in zip(layer.gradients(A.detach(), B.detach()), (A, B), strict=True):
        torch.testing.assert_close(gradient, factor.grad)


def test_a_layer_trains_as_a_plain_loop_does():
    scheme, sizes = init("both", -0.5, -0.5, -0.5), Settings(widths=(16, 32, 64), rank=3, steps=3)
    layer, A, B = gaussian(sizes)(scheme, 32, torch.Generator().manual_seed(5))
    found = trained(scheme, sizes, 32, layer, A.clone(), B.clone())
    start = A.clone(), B.clone()
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    optimizer = torch.optim.Adam([A, B], lr=0.1 * 32**-0.5, eps=1e-30)
    hidden = layer._base + B @ A @ layer.z
    losses = []
    for _ in range(3):
        before = A.detach().clone(), B.detach().clone()
        hidden = layer._base + B @ A @ layer.z
        loss = ((layer._out * hidden.relu()).mean() - 1) ** 2 / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = A.detach(), B.detach()
    expected = quantities(layer.z[None], start, before, after, 1.0)
    for name in ("z_a", "z_b", "delta1", "delta2", "delta3"):
        assert getattr(found.sizes, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert found.sizes.loss == pytest.approx(abs(layer.loss(*after) - losses[0]), rel=1e-5)
    assert found.size_a == pytest.approx(float(start[0].square().mean().sqrt()))


@pytest.fixture(scope="module")
def table():
    return measure_all(schemes(), QUICK)


def slopes(table, start, rate, optimizer="adam"):
    wanted = (start, optimizer, rate)
    (one,) = (one for one in table if (one.scheme.name, one.scheme.optimizer, one.scheme.rate_a) == wanted)
    return one.slopes


@pytest.mark.parametrize(("start", "rate"), [(start, rate) for start in STARTS for rate in (-0.5, -0.75, -1.0)])
def test_measured_exponents_are_those_where_drawn_sums_cancel(table, start, rate):
    found = slopes(table, start, rate)
    expected = predicted(init(start, *STARTS[start], rate), QUICK.steps, aligned=False)
    for name in ("z_a", "z_b", "delta1", "delta2"):
        # Finite widths mix powers that lie close.
        assert found[name].value == pytest.approx(getattr(expected, name), abs=0.2), name


def test_theorem_1_by_simulation(table):
    """Robust where A0 is as large as the theorem's aligned sums take it for; not where its entries are n^(-1/2)."""
    for rate in (-0.5, -0.75, -1.0):
        found = slopes(table, LARGE, rate)
        assert found["delta1"].value == pytest.approx(rate + 0.5, abs=TOLERANCE)
        assert found["delta2"].value == pytest.approx(rate + 0.5, abs=TOLERANCE)
        assert found["z_b"].value == pytest.approx(0, abs=TOLERANCE)
        # With B = 0 delta1 falls twice as fast.
        assert slopes(table, ZERO_B, rate)["delta1"].value == pytest.approx(2 * rate + 1, abs=TOLERANCE)
    assert slopes(table, BOTH, -0.75)["z_b"].high < -TOLERANCE
    assert slopes(table, BOTH, -1.0)["delta2"].value == pytest.approx(-1, abs=TOLERANCE)
    # Stable and efficient at the rate of equation 6, Init[B] only stable at its own.
    for start in (ZERO_B, BOTH):
        assert abs(slopes(table, start, -0.5)["z_b"].value) < 0.2
    assert slopes(table, ZERO_A, -0.5)["z_b"].low > 0.3
    assert slopes(table, ZERO_A, -1.0)["delta2"].high < -0.8
    plus = slopes(table, ZERO_A, -1.0, "lora+")
    assert all(abs(plus[name].value) < TOLERANCE for name in ("z_b", "delta1", "delta2"))


def test_every_claim_has_its_scheme(table):
    assert len(claims_sheet(table).rows) == len(CLAIMS)


def test_verdicts():
    def slope(value, half):
        return Slope(value, value - half, value + half, ())

    claim = Claim("", "", "", 0, {"z_b": 0.0, "delta1": -0.5})
    fine = {"z_b": slope(0.05, 0.02), "delta1": slope(-0.5, 0.1)}
    assert verdict(fine, claim) == "holds"
    assert verdict(fine, replace(claim, holds=False)) == "fails"
    assert verdict(fine | {"z_b": slope(0.3, 0.1)}, claim) == "fails"
    assert verdict(fine | {"z_b": slope(0.3, 0.1)}, replace(claim, holds=False)) == "holds"
    assert verdict(fine | {"z_b": slope(0.1, 0.1)}, claim) == "undecided"
    assert verdict(fine | {"z_b": None}, claim) == "fails"


def test_the_report_says_what_holds(table):
    said = answer(table, QUICK)
    assert "Of 138 measured exponents" in said
    assert "Init[AB] is robust in Z_B (Theorem 1)" in said
    rows = {row[0]: row[-1] for row in claims_sheet(table).rows}
    assert rows["Init[B] is not efficient there (Table 1)"] == "holds"
    assert rows["Init[AB] is robust in Z_B (Theorem 1)"] == "fails"
    assert rows["Init[AB] is robust in Z_B (Theorem 1), A as large as aligned sums take it for"] != "fails"
    assert len(exponents_sheet(table, QUICK).rows) == 138
    report = findings(table, QUICK)
    assert "Kaiming&#x27;s A" in as_page(report)
    assert "## Measured beside predicted" in as_markdown(report)


@ONE_BY_ONE
@pytest.mark.parametrize("method", ["lora", "init-ab", "pissa", "lora-one:samples=4", "lora-da:samples=4"])
def test_any_start_is_measured_at_its_own_sizes(method):
    sizes = Settings(widths=(32, 64, 128), rank=2, seeds=2)
    one = measured(Scheme(method, math.nan, math.nan, -0.5, -0.5), sizes, of_method(parse_method(method), sizes))
    assert one.start[0] is not None
    assert (one.start[1] is None) == (method == "lora")
    assert one.slopes["delta2"] is not None
    rows = exponents_sheet([one], sizes).rows
    assert all("nan" not in cell for row in rows for cell in row)
    if method == "lora":
        assert one.start[0].value == pytest.approx(-0.5, abs=0.1)
        assert float(rows[3][4]) == pytest.approx(0, abs=0.1)


def test_an_anchored_start_begins_at_the_base_models_output():
    generator = torch.Generator().manual_seed(3)
    sizes = Settings(widths=(32, 64, 128), rank=2)
    layer, A, B = of_method(parse_method("pissa"), sizes)(schemes()[0], 64, generator)
    base = OneLayer(64, torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = base(layer.z[None].float(), torch.ones(1))["loss"]
    assert float(B.norm()) > 0
    assert layer.loss(A, B) == pytest.approx(float(plain), rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(POWERS, POWERS, POWERS, st.sampled_from(["adam", "lora+", "sgd"]))
def test_a_scheme_of_ones_own_is_read(a, b, rate, optimizer):
    made = parsed(f"{a},{b},{rate}", optimizer)
    assert (made.a, made.b, made.rate_a, made.rate_b) == (a, b, rate, rate)
    assert made.outputs == ("one" if optimizer == "sgd" else "n")
    own = parsed(f"{a}, zero, {rate}, 0.5", optimizer)
    assert (own.b, own.rate_b) == (NOTHING, 0.5)
    assert own.name == f"A of n^{a}, B = 0"


@pytest.mark.parametrize(
    "text", ["", "-0.5", "-0.5,-0.5", "a,b,c", "zero,zero,-0.5", "1,2,3,4,5", "nan,0,-1", "0,0,zero"]
)
def test_what_is_no_scheme_is_refused(text):
    with pytest.raises(RunError, match="is no scheme: give the exponents"):
        parsed(text, "adam")


def test_sgd_of_a_layer_with_many_outputs():
    """Each output is sent back a gradient smaller by n, so that a rate of n for B is one of order 1 for one output."""
    wide = Scheme("both", -0.5, 0.0, -1.0, 1.0, "sgd")
    one = measured(wide, replace(QUICK, rate=0.1))
    expected = predicted(wide, QUICK.steps, aligned=False)
    for name in ("z_a", "z_b", "delta1", "delta2"):
        assert one.slopes[name].value == pytest.approx(getattr(expected, name), abs=0.2), name


def test_a_start_of_the_verb_may_be_trained_otherwise():
    sizes = Settings(widths=(32, 64, 128), rank=2, seeds=2)
    for optimizer in ("lora+", "sgd"):
        scheme = of_start("lora", -1.0, optimizer)
        assert scheme.rate_b == (0.0 if optimizer == "lora+" else -1.0)
        one = measured(scheme, sizes, of_method(parse_method("lora"), sizes))
        assert one.slopes["delta2"] is not None


def test_cores_are_refused():
    with pytest.raises(MethodError, match="trains a core"):
        of_method(parse_method("lora-xs"), QUICK)


@pytest.mark.parametrize(
    "wrong",
    [{"widths": (64, 128)}, {"widths": (4, 64, 128)}, {"seeds": 1}, {"steps": 1}, {"rate": 0.0}, {"size": math.inf}],
)
def test_settings_that_are_none_are_refused(wrong):
    with pytest.raises(RunError):
        Settings(**wrong)


def test_command(tmp_path, capsys):
    small = f"--widths 16,32,64 --rank 2 --seeds 2 --steps 2 --no-pictures --out {tmp_path}"
    main(["dynamics", "exponents", *small.split()])
    assert "Claims" in capsys.readouterr().out
    rows = json.loads((tmp_path / "exponents.json").read_text())
    assert len(rows) == 138
    assert {row["quantity"] for row in rows} == {"z_a", "z_b", "delta1", "delta2", "delta3", "loss"}
    main(["dynamics", "exponents", "--methods", "lora,pissa", "--rates", "-0.5,-1", *small.split()])
    assert {row["start"] for row in json.loads((tmp_path / "exponents.json").read_text())} == {"lora", "pissa"}
    main(
        [
            "dynamics",
            "exponents",
            "--scheme=-0.5,zero,-0.75",
            "--scheme=0,-0.5,-0.75",
            "--optimizer",
            "sgd",
            *small.split(),
        ]
    )
    rows = json.loads((tmp_path / "exponents.json").read_text())
    assert {row["start"] for row in rows} == {"A of n^-0.5, B = 0", "A of n^0, B of n^-0.5"}
    assert "Claims" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["dynamics", "exponents", "--optimizer", "adamw"])
    assert left.value.code == 2
    with pytest.raises(SystemExit) as left:
        main(["dynamics", "exponents", "--widths", "16,x"])
    assert left.value.code == 2
    assert "--widths takes numbers with commas" in " ".join(capsys.readouterr().err.split())

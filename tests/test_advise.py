"""Advice: the curvature along a first step against its definition, costs from shapes, and what the command prints."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from headstart.advise.costs import Machine, predicted
from headstart.advise.probe import probe
from headstart.advise.sweep import sweep
from headstart.cli import main
from headstart.methods import parse_method
from headstart.runs.stages import execute
from headstart.runs.tree import Optimizer, Schedule
from headstart.study.cells import Grid
from headstart.study.tree import validated_study
from running import llama_folder, small_run, sums


class Polynomial(nn.Module):
    """A loss that is a polynomial of two parameter blocks, and a third that nothing depends on."""

    def __init__(self, quadratic, cubic=0.0):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.tensor([0.5, -1.0])), nn.Parameter(torch.tensor([2.0]))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.quadratic, self.cubic = quadratic, cubic

    def forward(self, scale):
        theta = torch.cat([self.A, self.B])
        start = torch.tensor([0.5, -1.0, 2.0])
        moved = theta - start
        slope = torch.tensor([1.0, -2.0, 0.25])
        loss = slope @ moved + moved @ self.quadratic @ moved / 2 + self.cubic * moved.pow(3).sum()
        return SimpleNamespace(loss=scale * loss)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_probe_of_a_quadratic_is_its_best_step(optimizer):
    H = torch.tensor([[3.0, 0.5, 0.0], [0.5, 2.0, -0.25], [0.0, -0.25, 4.0]])
    gradient = torch.tensor([1.0, -2.0, 0.25])
    direction = gradient.sign() if optimizer == "adamw" else gradient
    model = Polynomial(H)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = probe(model, [{"scale": 0.5}, {"scale": 1.5}], optimizer)
    assert found.slope == pytest.approx(float(gradient @ direction), rel=1e-5)
    assert found.curvature == pytest.approx(float(direction @ H @ direction), rel=1e-3)
    assert found.rate == pytest.approx(float(gradient @ direction) / float(direction @ H @ direction), rel=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_falls_ever_faster_has_no_best_step():
    assert probe(Polynomial(-torch.eye(3)), [{"scale": 1.0}]).rate == math.inf


def test_a_start_that_no_gradient_reaches_has_no_rate():
    model = Polynomial(torch.eye(3))
    assert math.isnan(probe(model, [{"scale": 0.0}]).rate)


def test_the_sharper_of_two_starts_is_given_the_lower_rate():
    rates = [probe(Polynomial(torch.eye(3) * sharp), [{"scale": 1.0}]).rate for sharp in (1.0, 9.0)]
    assert rates[0] / rates[1] == pytest.approx(9, rel=1e-2)


def test_costs_by_hand():
    machine = Machine(pass_seconds=0.5, svd_seconds={(6, 4): 0.01, (4, 6): 0.02}, shapes={(6, 4): 3, (4, 6): 1}, rank=2)
    factors = 4 * 2 * (10 * 4) * 2  # start and anchor of four layers, each of 10 columns and rows
    plain = predicted(parse_method("lora"), machine, None)
    assert (plain.seconds, plain.memory) == (0, factors)
    weight = predicted(parse_method("pissa"), machine, None)
    assert weight.seconds == pytest.approx(3 * 0.01 + 0.02) and weight.memory == factors
    gradient = predicted(parse_method("lora-one:samples=10"), machine, None)
    assert gradient.seconds == pytest.approx(10 * 0.5 + 0.05) and gradient.memory == factors + 4 * 24 * 4
    inputs = predicted(parse_method("eva:samples=6"), machine, None)
    assert inputs.seconds == pytest.approx(6 * 0.5 / 3 + 0.05) and inputs.memory == factors + 4 * (3 * 16 + 36)


def test_the_command_prints_a_study_that_would_decide(tmp_path, capsys):
    model, data = llama_folder(tmp_path / "model"), sums(tmp_path / "sums.jsonl", 90)
    arguments = ["advise", str(model), "--data", str(data), "--rank", "2", "--max-length", "64", "--batches", "1"]
    arguments += ["--methods", "pissa,lora-one:samples=4,init-ab"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "Nothing was trained" in printed and "0.0002 for plain lora" in printed
    study = yaml.safe_load(printed[printed.index("base:") :])
    grid = Grid(validated_study(study, "printed"))
    assert grid.starts == ("lora", "pissa", "lora-one:samples=4", "init-ab") and len(grid.cells()) == 4 * 5 * 3
    main([*arguments, "--json"])
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["pissa"]["published"] == pytest.approx(0.1) and rows["lora-one:samples=4"]["published"] is None
    assert all(row["trainable"] == rows["lora"]["trainable"] and row["seconds"] > 0 for row in rows.values())
    assert rows["pissa"]["probe"]["slope"] > 0


def test_a_sweep_trains_at_rates_around_the_probed_ones(tmp_path, capsys):
    model, data = llama_folder(tmp_path / "model"), sums(tmp_path / "sums.jsonl", 90)
    arguments = ["advise", str(model), "--data", str(data), "--rank", "2", "--max-length", "64", "--batches", "1"]
    arguments += ["--methods", "pissa,lora-ga:samples=4", "--targets", "q_proj,v_proj", "--lr", "0.004"]
    main([*arguments, "--sweep", "4", "--json"])
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    for row in rows.values():
        middle = 0.004 * (row["probed"] if row["probed"] is not None else row["published"])
        assert row["rate"] == row["swept"] and row["swept"] / middle == pytest.approx(4, rel=0.03)  # all fall on
    main([*arguments, "--sweep", "4"])
    printed = capsys.readouterr().out
    assert "rate swept" in printed and "in the last half of 4 steps" in printed and "Nothing was trained" not in printed


def test_the_swept_rate_is_that_of_the_lowest_loss(tmp_path):
    run = small_run(llama_folder(tmp_path / "model"), sums(tmp_path / "sums.jsonl", 90))
    rates = {"lora": [1e-3, 3e-2, 1e6], "pissa": [1e6]}
    found = sweep(run, rates, 6)
    assert found["lora"] == 3e-2
    alone = {}
    for rate in (1e-3, 3e-2):
        own = run.model_copy(update={"optimizer": Optimizer(lr=rate), "schedule": Schedule(steps=6)})
        alone[rate] = execute(own, tmp_path / str(rate))
    last = {rate: sum(loss for step, loss in result.series["loss"] if step > 3) for rate, result in alone.items()}
    assert last[3e-2] < last[1e-3]


def test_a_start_that_cannot_be_made_is_said_and_the_others_stay(tmp_path, capsys):
    model, data = llama_folder(tmp_path / "model"), sums(tmp_path / "sums.jsonl", 90)
    main(
        [
            "advise",
            str(model),
            "--data",
            str(data),
            "--rank",
            "12",
            "--max-length",
            "64",
            "-m",
            "lora-ga:samples=4,pissa",
        ]
    )
    printed = capsys.readouterr().out
    assert "lora-ga:samples=4 can't be made here: " in printed and "pissa" in printed

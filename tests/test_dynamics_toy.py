"""The toy experiment: shared parts against a plain model, files of images, resuming, and what its report says."""

from __future__ import annotations

import gzip
import json
import struct

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from headstart.cli.app import main
from headstart.dynamics import experiment
from headstart.dynamics.experiment import DEVIATIONS, RATES, STARTS, Cell, Seed, Settings, read_toy, run_toy
from headstart.dynamics.figure import answer, charts, findings, gathered, sheet
from headstart.dynamics.images import Images, read_idx, read_images
from headstart.dynamics.toy import (
    batches,
    fine_tune_,
    fresh_network,
    frozen_part,
    gradients_,
    measure,
    pretrain,
)
from headstart.errors import CheckpointError, DataError, HeadstartError, RunError
from headstart.reports.findings import as_markdown, as_page
from headstart.reports.tables import escaped
from headstart.store.claims import alone_in

SMALL = Settings(
    width=24, rank=3, pretrain_steps=5, steps=4, batch=8, rates=(1e-3, 1e-2), deviations=(1e-3, 0.3), seeds=2
)


class Plain(nn.Module):
    """The model as one would write it: nothing shared, gradients by autograd."""

    def __init__(self, network, A, B):
        super().__init__()
        self.network = network
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, pixels):
        hidden = (pixels @ self.network.into.T).relu()
        return ((self.network.middle + self.B @ self.A) @ hidden.T).T.relu() @ self.network.out.T


def some_images(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    pixels = torch.rand(count, 784, generator=generator) * 0.2
    pixels[torch.arange(count), labels * 70] += 3.0
    return Images(pixels, labels)


def write_idx(path, tensor, pack=False):
    content = struct.pack(f">BBBB{tensor.ndim}I", 0, 0, 8, tensor.ndim, *tensor.shape) + bytes(
        tensor.flatten().tolist()
    )
    path.write_bytes(gzip.compress(content) if pack else content)


@pytest.fixture
def folders(tmp_path):
    """Two sets of images, one of them packed."""
    made = []
    for place, (name, pack) in enumerate((("mnist", False), ("fashion", True))):
        folder = tmp_path / name
        folder.mkdir()
        for part, count in (("train", 40), ("t10k", 20)):
            images = some_images(count, place)
            pixels = (images.pixels.clamp(0, 1) * 255).to(torch.uint8).reshape(count, 28, 28)
            end = ".gz" if pack else ""
            write_idx(folder / f"{part}-images-idx3-ubyte{end}", pixels, pack)
            write_idx(folder / f"{part}-labels-idx1-ubyte{end}", images.labels.to(torch.uint8), pack)
        made.append(folder)
    return made


def test_a_cell_is_what_a_plain_model_gives_one_at_a_time():
    images, test = some_images(), some_images(30, 1)
    network = fresh_network(48, 0)
    generator = torch.Generator().manual_seed(1)
    A, B = (0.2 * torch.randn(shape, generator=generator) for shape in ((4, 48), (48, 4)))
    rows = list(batches(len(images), 25, 8, 0))
    plain = Plain(network, A, B)
    optimizer = torch.optim.AdamW([plain.A, plain.B], lr=3e-3, weight_decay=0)
    expected = []
    for batch in rows:
        loss = cross_entropy(plain(images.pixels[batch]), images.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    losses = fine_tune_(A, B, network.out, [frozen_part(network, images, batch) for batch in rows], 3e-3)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(A, plain.A.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B, plain.B.detach(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        logits = plain(test.pixels)
    loss, accuracy = measure(A, B, network.out, frozen_part(network, test))
    assert loss == pytest.approx(float(cross_entropy(logits, test.labels)), rel=1e-5)
    assert accuracy == pytest.approx(float((logits.argmax(1) == test.labels).float().mean()))


def test_gradients_are_autograds_in_float64():
    network = fresh_network(20, 3)
    network = type(network)(network.into.double(), network.middle.double(), network.out.double())
    images = Images(some_images(16).pixels.double(), some_images(16).labels)
    A, B = torch.randn(3, 20, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    plain = Plain(network, A, B)
    loss = cross_entropy(plain(images.pixels), images.labels)
    loss.backward()
    A.grad, B.grad = torch.empty_like(A), torch.empty_like(B)
    assert gradients_(A, B, network.out, frozen_part(network, images)) == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(A.grad, plain.A.grad)
    torch.testing.assert_close(B.grad, plain.B.grad)


def test_many_images_are_measured_in_blocks():
    network = fresh_network(16, 0)
    test = frozen_part(network, some_images(300))
    A, B = torch.randn(2, 16), torch.randn(16, 2)
    logits = (test.base + test.inputs @ A.T @ B.T).relu() @ network.out.T
    loss, accuracy = measure(A, B, network.out, test)
    assert loss == pytest.approx(float(cross_entropy(logits, test.labels)), rel=1e-5)
    assert accuracy == pytest.approx(float((logits.argmax(1) == test.labels).float().mean()))


def test_pretraining_is_plain_adamw_on_all_three_weights_and_leaves_the_given_ones():
    images, network = some_images(), fresh_network(16, 0)
    before = network.middle.clone()
    weights = [part.clone().requires_grad_() for part in (network.into, network.middle, network.out)]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0)
    for rows in batches(len(images), 6, 8, 5):
        logits = ((images.pixels[rows] @ weights[0].T).relu() @ weights[1].T).relu() @ weights[2].T
        optimizer.zero_grad()
        cross_entropy(logits, images.labels[rows]).backward()
        optimizer.step()
    made = pretrain(network, images, steps=6, rate=1e-2, batch=8, seed=5)
    for mine, expected in zip((made.into, made.middle, made.out), weights, strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-4, atol=1e-6)
    assert torch.equal(network.middle, before)


def test_fresh_weights_have_he_variance():
    network = fresh_network(1000, 0)
    for weight, inputs in ((network.into, 784), (network.middle, 1000), (network.out, 1000)):
        assert float(weight.var()) * inputs == pytest.approx(2, rel=0.05)


def test_batches_pass_over_all_rows_before_any_comes_again():
    rows = torch.cat(list(batches(10, 6, 5, 0)))
    assert len(rows) == 30
    for start in (0, 10, 20):
        assert sorted(rows[start : start + 10].tolist()) == list(range(10))
    assert torch.equal(rows, torch.cat(list(batches(10, 6, 5, 0))))


def test_defaults_are_the_papers():
    settings = Settings()
    assert (settings.width, settings.rank, settings.batch, settings.steps, settings.seeds) == (4096, 32, 64, 100, 10)
    assert len(RATES) == 10
    assert len(DEVIATIONS) == 12


def test_an_experiment_goes_on_after_a_kill_and_ends_the_same(tmp_path, folders, monkeypatch):
    whole = run_toy(SMALL, *folders, tmp_path / "whole")

    def killed(*given):
        if given[4] == 1:
            raise KeyboardInterrupt
        return one_seed(*given)

    one_seed = experiment._one_seed
    monkeypatch.setattr(experiment, "_one_seed", killed)
    with pytest.raises(KeyboardInterrupt):
        run_toy(SMALL, *folders, tmp_path / "cut")
    assert len(read_toy(tmp_path / "cut")[1]) == 1
    monkeypatch.setattr(experiment, "_one_seed", one_seed)
    monkeypatch.setattr(experiment, "pretrain", None)  # the kept model is read
    assert run_toy(SMALL, *folders, tmp_path / "cut") == whole
    monkeypatch.setattr(experiment, "_one_seed", None)
    assert run_toy(SMALL, *folders, tmp_path / "cut") == whole


def test_all_cells_are_there_once_and_small_starts_of_both_kinds_agree(tmp_path, folders):
    _, seeds = run_toy(SMALL, *folders, tmp_path / "toy")
    assert [seed.seed for seed in seeds] == [0, 1]
    for seed in seeds:
        keys = [(cell.start, cell.deviation, cell.rate) for cell in seed.cells]
        assert len(set(keys)) == len(keys) == len(STARTS) * 4
        assert all(len(cell.losses) == SMALL.steps for cell in seed.cells)
        # B A of Init[AB] at 1e-3 is some 1e-6: the first batch is lost as without an adapter.
        first = {cell.start: cell.losses[0] for cell in seed.cells if cell.deviation == 1e-3}
        assert first["Init[AB]"] == pytest.approx(first["Init[A]"], rel=1e-3)
        large = {cell.start: cell.losses[0] for cell in seed.cells if cell.deviation == 0.3}
        assert large["Init[A]"] == pytest.approx(first["Init[A]"], rel=1e-6)
        assert large["Init[AB]"] != pytest.approx(first["Init[A]"], rel=1e-3)


def test_models_are_pretrained_once_or_for_each_seed(tmp_path, folders):
    run_toy(SMALL, *folders, tmp_path / "once")
    each = Settings(**{**SMALL.__dict__, "pretrain": "each"})
    run_toy(each, *folders, tmp_path / "each")
    assert len(list((tmp_path / "once").glob("pretrained-*"))) == 1
    assert len(list((tmp_path / "each").glob("pretrained-*"))) == 2


def test_more_seeds_are_more_of_the_same_and_other_settings_are_refused(tmp_path, folders):
    run_toy(Settings(**{**SMALL.__dict__, "seeds": 1}), *folders, tmp_path / "toy")
    assert len(run_toy(SMALL, *folders, tmp_path / "toy")[1]) == 2
    assert len(run_toy(Settings(**{**SMALL.__dict__, "seeds": 1}), *folders, tmp_path / "toy")[1]) == 2
    with pytest.raises(RunError, match=r"other rank, width: give another --out"):
        run_toy(Settings(**{**SMALL.__dict__, "rank": 2, "width": 8}), *folders, tmp_path / "toy")
    with pytest.raises(RunError, match="holds no toy experiment"):
        run_toy(SMALL, *folders, folders[0])


def test_two_commands_on_one_folder_are_refused(tmp_path, folders):
    run_toy(Settings(**{**SMALL.__dict__, "seeds": 1}), *folders, tmp_path / "toy")
    with alone_in(tmp_path / "toy"), pytest.raises(RunError, match=r"is being worked on by process \d+"):
        run_toy(SMALL, *folders, tmp_path / "toy")


@pytest.mark.parametrize("name", ["toy.json", "seed-0.json", "pretrained-0.safetensors"])
def test_damaged_files_are_named(tmp_path, folders, name):
    folder = tmp_path / "toy"
    run_toy(Settings(**{**SMALL.__dict__, "seeds": 1}), *folders, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:30])
    if name.startswith("pretrained"):
        (folder / "seed-0.json").unlink()
    with pytest.raises(CheckpointError, match=name):
        run_toy(SMALL, *folders, folder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 25}, "rank 25 is larger than the width 24"),
        ({"rates": (1e-3, 1e-3)}, "rates must be positive numbers"),
        ({"deviations": ()}, "deviations must be"),
        ({"rates": (float("nan"),)}, "rates must be"),
        ({"pretrain_rate": 0.0}, "pretrain_rate must be positive"),
        ({"test_images": 0}, "test_images must be at least 1"),
    ],
)
def test_settings_that_are_none_are_refused(changed, words):
    with pytest.raises(RunError, match=words):
        Settings(**{**SMALL.__dict__, **changed})


def test_images_are_read_packed_or_not(folders):
    for folder in folders:
        images = read_images(folder, "train", 7)
        assert images.pixels.shape == (7, 784)
        assert images.pixels.dtype == torch.float32
        assert float(images.pixels.max()) == 1.0
        assert images.labels.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01abcd", "is no IDX file of bytes"),
        (b"\x00\x00\x08\x03\x00\x00\x00\x01", "ends within its head"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abcd", r"holds 4 bytes, not the 5 of \(5,\)"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x00", "holds nothing"),
        (b"\x1f\x8bgarbage", "can't be read"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abcde", mtime=0)[:-9], "can't be read"),
    ],
)
def test_bad_idx_files_are_named(tmp_path, content, words):
    path = tmp_path / "odd-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"odd-idx1-ubyte {words}"):
        read_idx(path)


def test_images_that_do_not_fit_are_refused(tmp_path, folders):
    with pytest.raises(DataError, match="has no train-images-idx3-ubyte"):
        read_images(tmp_path, "train")
    write_idx(folders[0] / "train-labels-idx1-ubyte", torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"holds \(3,\) labels for 40 images"):
        read_images(folders[0], "train")
    write_idx(folders[0] / "train-labels-idx1-ubyte", torch.full((40,), 10, dtype=torch.uint8))
    with pytest.raises(DataError, match="no labels from 0 to 9"):
        read_images(folders[0], "train")
    write_idx(folders[0] / "train-images-idx3-ubyte", torch.zeros(40, 5, 5, dtype=torch.uint8))
    with pytest.raises(DataError, match="not images of 28 by 28"):
        read_images(folders[0], "train")


def made_up(seeds=3, gain=0.5):
    """Return a figure of which the truth is known: Init[AB] is lower by ``gain`` at the lower rate alone."""
    settings = Settings(**{**SMALL.__dict__, "seeds": seeds})
    made = []
    for seed in range(seeds):
        cells = []
        for start, deviation, rate in experiment._cells(settings):
            loss = 2.0 + 0.1 * seed + (rate == 1e-3) - gain * (start == "Init[AB]" and rate == 1e-3) + 0.01 * deviation
            loss += 0.001 * seed * (start == "Init[AB]")
            cells.append(Cell(start, deviation, rate, loss, 0.5, (3.0, 2.5, 2.2, loss)))
        made.append(Seed(seed, 4.0, tuple(cells)))
    return gathered(settings, made)


def test_the_answer_says_what_the_cells_say():
    said = answer(made_up())
    assert "At the lowest rate, 1e-3, each at its own best size, Init[AB] ends at 2.6010" in said
    assert "and Init[A] at 3.1000 (deviation 1e-3, rate 1e-3): -0.4990 ± 0.0025." in said
    assert "Init[AB] is lower in 2 and higher in 0 of 4 cells" in said
    assert "lower in 0 and higher in 0 of 4" in answer(made_up(gain=0.0))
    assert "One seed has no intervals" in answer(made_up(seeds=1))


def test_maps_hold_the_means_and_the_ratio():
    figure = made_up()
    by_name = {chart.name: chart for chart in charts(figure)}
    assert list(by_name) == ["loss-a", "loss-ab", "improvement", "rates", "steps"]
    rows = {row[:2]: row[2] for row in by_name["improvement"].rows}
    assert rows[1e-3, 1e-3] == pytest.approx(100 * 0.499 / figure.mean("Init[A]", 1e-3, 1e-3))
    assert rows[1e-3, 1e-2] == pytest.approx(-100 * 0.001 / figure.mean("Init[A]", 1e-3, 1e-2))
    assert sheet(figure).rows[0][:4] == ("1e-3", "3.1000", "2.6010", "-0.4990 ± 0.0025")


def test_report_is_one_page_and_markdown():
    found = findings(made_up())
    page, text = as_page(found), as_markdown(found)
    assert page.count("<h1>") == 1
    for chart in charts(made_up()):
        assert f"pictures/{chart.name}.png" in text
        assert escaped(chart.title) in text
    assert "Init[AB] ends at 2.6010" in page
    assert "## By size of the start" in text


def test_command_runs_and_goes_on(tmp_path, folders, capsys):
    places = f"--mnist {folders[0]} --fashion {folders[1]} --out {tmp_path / 'toy'}"
    small = "--width 16 --rank 2 --seeds 1 --steps 2 --pretrain-steps 2 --no-pictures"
    options = f"dynamics toy {places} {small}".split()
    with pytest.raises(SystemExit):
        main(options)
    assert "fewer than a batch of 64" in " ".join(capsys.readouterr().err.split())
    for folder in folders:
        images = some_images(80)
        pixels = (images.pixels.clamp(0, 1) * 255).to(torch.uint8).reshape(80, 28, 28)
        end = ".gz" if folder.name == "fashion" else ""
        write_idx(folder / f"train-images-idx3-ubyte{end}", pixels, bool(end))
        write_idx(folder / f"train-labels-idx1-ubyte{end}", images.labels.to(torch.uint8), bool(end))
    main(options)
    assert "One seed has no intervals" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "toy" / "seed-0.json").read_text())["cells"]) == 240
    assert (tmp_path / "toy" / "report.html").is_file()
    main(options)
    assert "One seed has no intervals" in capsys.readouterr().out


def test_command_says_where_images_are_to_be_had(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("headstart.cli.dynamics._MNIST", ("nowhere",))
    with pytest.raises(SystemExit) as left:
        main(["dynamics", "toy"])
    assert left.value.code == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "error: give --mnist the folder of the IDX files, as none of nowhere is there." in said
    with pytest.raises(SystemExit) as left:
        main(["dynamics", "toy", "--pretrain", "never"])
    assert left.value.code == 2
    assert issubclass(DataError, HeadstartError)

import gc
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headstart.linalg import sketch as module
from headstart.linalg.sketch import GradientSketch, SketchedSVD

PASSES = [1, 2, 3, 4, 5]
SHAPES = [(90, 140), (140, 90), (100, 100)]


class Layer:
    """Inputs and gradients of a layer whose G has a given spectrum, and its exact triplets."""

    def __init__(self, d_out: int, d_in: int, S: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(d_out, len(S), generator=generator, dtype=torch.float64)
        self.U, self.S = torch.linalg.qr(draw).Q, S.double()
        self.V = torch.linalg.qr(torch.randn(d_in, len(S), generator=generator, dtype=torch.float64)).Q
        self.G = (self.U * self.S) @ self.V.mT
        # Tokens that are a rotation away from the triplets, so that no token is one of them.
        rotation = torch.linalg.qr(torch.randn(len(S), len(S), generator=generator, dtype=torch.float64)).Q
        self.x, self.g = rotation @ self.V.mT, (rotation * self.S) @ self.U.mT

    def sketch(self, width: int, passes: int, **options: Any) -> GradientSketch:
        sketch = GradientSketch(*self.G.shape, width, passes, **options)
        run(sketch, self.x.float(), self.g.float())
        return sketch

    def residual(self, svd: SketchedSVD) -> float:
        U, S, V = svd.U.double(), svd.S.double(), svd.V.double()
        squared = (self.G @ V - U * S).square().sum() + (self.G.mT @ U - V * S).square().sum()
        return math.sqrt(float(squared)) / float(S[0])

    def sines(self, svd: SketchedSVD) -> tuple[float, float]:
        k = len(svd.S)
        return largest_sine(self.U[:, :k], svd.U), largest_sine(self.V[:, :k], svd.V)


def run(sketch: GradientSketch, x: Tensor, g: Tensor) -> None:
    for number in range(sketch.passes):
        if number:
            sketch.advance()
        sketch.add(x, g)


def largest_sine(exact: Tensor, found: Tensor) -> float:
    found = found.double()
    return float(torch.linalg.matrix_norm(found - exact @ (exact.mT @ found), 2))


def power(n: int, exponent: float) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -exponent


def product(svd: SketchedSVD) -> Tensor:
    return (svd.U.double() * svd.S.double()) @ svd.V.double().mT


def check(svd: SketchedSVD, d_out: int, d_in: int, k: int) -> None:
    """Check what holds for every result."""
    assert svd.U.shape == (d_out, k) and svd.S.shape == (k,) and svd.V.shape == (d_in, k)
    assert svd.U.dtype == svd.S.dtype == svd.V.dtype == torch.float32
    assert bool((svd.S[1:] <= svd.S[:-1]).all()) and bool((svd.S >= 0).all())
    for vectors in (svd.U.double(), svd.V.double()):
        assert float((vectors.mT @ vectors - torch.eye(k, dtype=torch.float64)).abs().max()) < 2e-6
    assert bool((svd.U.gather(0, svd.U.abs().argmax(dim=0, keepdim=True)) > 0).all())
    assert 0 <= svd.angle_left <= 1 and 0 <= svd.angle_right <= 1 and 0 <= svd.share <= 1
    assert math.isfinite(svd.norm) and svd.norm >= 0 and math.isfinite(svd.residual) and svd.residual >= 0


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_low_rank_matrix_is_recovered_exactly(shape: tuple[int, int], passes: int) -> None:
    for rank in (1, 5, GradientSketch(*shape, 16, passes).rank_limit):
        layer = Layer(*shape, torch.linspace(2, 1, rank, dtype=torch.float64))
        svd = layer.sketch(16, passes).finish(rank)
        check(svd, *shape, rank)
        torch.testing.assert_close(svd.S.double(), layer.S, rtol=2e-5, atol=0)
        assert float((product(svd) - layer.G).norm() / layer.G.norm()) < 5e-5
        assert max(layer.sines(svd)) < 1e-4
        assert svd.norm == pytest.approx(float(layer.S.norm()), rel=1e-4)
        assert svd.residual < 1e-4 and svd.share == pytest.approx(1, abs=1e-4)
        assert svd.angle_left < 1e-3 and svd.angle_right < 1e-3


@pytest.mark.parametrize("passes", PASSES)
def test_fewer_and_more_triplets_than_the_rank(passes: int) -> None:
    layer = Layer(80, 60, torch.tensor([3.0, 2.0, 1.0]))
    sketch = layer.sketch(16, passes)
    for k in (1, 2):
        torch.testing.assert_close(sketch.finish(k).S.double(), layer.S[:k], rtol=1e-5, atol=0)
        assert sketch.finish(k).angle_left < 1e-3
    more = sketch.finish(6)
    check(more, 80, 60, 6)
    assert float(more.S[3:].max()) < 1e-5
    # Which other vectors belong to the subspace isn't determined.
    assert more.angle_left > 0.01 and more.angle_right > 0.01


@pytest.mark.parametrize("passes", [2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 50), (50, 12), (7, 7)])
def test_a_width_that_holds_the_whole_matrix(shape: tuple[int, int], passes: int) -> None:
    layer = Layer(*shape, torch.linspace(1, 0.5, min(shape), dtype=torch.float64))
    sketch = layer.sketch(64, passes)
    assert sketch.rank_limit == min(shape)
    torch.testing.assert_close(sketch.finish(min(shape)).S.double(), layer.S, rtol=1e-5, atol=0)
    svd = sketch.finish(3)
    assert max(layer.sines(svd)) < 1e-4 and svd.angle_left < 1e-3 and svd.angle_right < 1e-3


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_order_and_batches_do_not_matter(shape: tuple[int, int], passes: int) -> None:
    layer = Layer(*shape, power(40, 1.5))
    x, g = layer.x.float(), layer.g.float()
    whole = layer.sketch(18, passes).finish(4)
    parts = GradientSketch(*shape, 18, passes)
    for number in range(passes):
        if number:
            parts.advance()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        for batch in order.split(7 + number):
            # Further leading dimensions, as a layer sees them.
            parts.add(x[batch][None], g[batch][None])
    other = parts.finish(4)
    torch.testing.assert_close(other.S, whole.S, rtol=1e-4, atol=0)
    torch.testing.assert_close(product(other), product(whole), rtol=0, atol=1e-4)
    for name in ("norm", "residual", "angle_left", "angle_right", "share"):
        assert getattr(other, name) == pytest.approx(getattr(whole, name), rel=1e-2), name


@pytest.mark.parametrize("passes", PASSES)
def test_two_processes_whose_sums_are_added_are_one(passes: int) -> None:
    layer = Layer(90, 70, power(50, 1.0))
    x, g = layer.x.float(), layer.g.float()
    first, second = (GradientSketch(90, 70, 16, passes, seed=5) for _ in range(2))
    for number in range(passes):
        if number:
            first.advance()
            second.advance()
        first.add(x[:20], g[:20])
        second.add(x[20:], g[20:])
        for mine, theirs in zip(first.tensors(), second.tensors(), strict=True):
            mine += theirs
            theirs.copy_(mine)
    one, other, alone = first.finish(4), second.finish(4), layer.sketch(16, passes, seed=5).finish(4)
    torch.testing.assert_close(one.U, other.U, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.V, other.V, rtol=0, atol=1e-6)
    torch.testing.assert_close(product(one), product(alone), rtol=0, atol=1e-4)
    assert one.norm == pytest.approx(alone.norm, rel=1e-3) and one.residual == pytest.approx(alone.residual, rel=1e-2)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("shape", [(60, 100), (100, 60)])
def test_estimates_are_right_on_average(shape: tuple[int, int], passes: int) -> None:
    layer = Layer(*shape, power(60, 0.7))
    norms, ratios = [], []
    for seed in range(120):
        svd = layer.sketch(18, passes, seed=seed).finish(5)
        norms.append(svd.norm**2 / float(layer.S.square().sum()))
        ratios.append(svd.residual**2 / layer.residual(svd) ** 2)
        expected = float(svd.S.double().square().sum()) / svd.norm**2
        assert svd.share == pytest.approx(min(1.0, expected), rel=1e-5)
    for values in (torch.tensor(norms), torch.tensor(ratios)):
        # Four standard errors; and no single one is off by an order of magnitude.
        assert abs(float(values.mean()) - 1) < 4 * float(values.std()) / math.sqrt(len(values))
        assert float(values.std()) < 0.8 and float(values.min()) > 0.05 and float(values.max()) < 5


@pytest.mark.parametrize("passes", [2, 3, 4])
@pytest.mark.parametrize(("exponent", "most_below"), [(0.5, 1), (1.0, 2), (2.0, 12)])
def test_estimated_angles_are_seldom_below_the_true_ones(exponent: float, most_below: int, passes: int) -> None:
    layer = Layer(120, 80, power(80, exponent))
    ratios = []
    for seed in range(30):
        svd = layer.sketch(20, passes, seed=seed).finish(4)
        left, right = layer.sines(svd)
        ratios.append(max(svd.angle_left, svd.angle_right) / max(left, right))
        # The side that is more exact is the one that the estimate is too careful about.
        assert min(svd.angle_left, svd.angle_right) > min(left, right)
    assert sum(ratio < 1 for ratio in ratios) <= most_below and min(ratios) > 0.2
    assert 1 < sorted(ratios)[15] < 5


@pytest.mark.parametrize("noise", [1e-4, 1e-3])
def test_estimated_angles_of_a_single_pass_over_an_almost_low_rank_matrix(noise: float) -> None:
    layer = Layer(120, 80, torch.cat([torch.linspace(2, 1, 4, dtype=torch.float64), noise * power(76, 0.5)]))
    ratios = []
    for seed in range(30):
        svd = layer.sketch(20, 1, seed=seed).finish(4)
        left, right = layer.sines(svd)
        ratios += [svd.angle_left / left, svd.angle_right / right]
    # Here is no side to be careful about: the bound is close to an equation, and its residuals are off by chance.
    assert min(ratios) > 0.4 and 1 < sorted(ratios)[30] < 2 and max(ratios) < 4


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(150, 240), (240, 150), (200, 200)])
def test_angles_shrink_with_the_passes(shape: tuple[int, int], exponent: float) -> None:
    layer = Layer(*shape, power(min(shape), exponent))
    means = []
    for passes in (1, 2, 3, 4, 6):
        sines = [layer.sines(layer.sketch(22, passes, seed=seed).finish(8)) for seed in range(5)]
        # One side is half a step behind the other, which one depends on the number of passes.
        means.append((sum(max(pair) for pair in sines) / 5, sum(min(pair) for pair in sines) / 5))
    for (worse, better), (next_worse, next_better) in itertools.pairwise(means):
        assert next_worse < 0.95 * worse and next_better < 0.95 * better
    assert means[-1][0] < (0.02 if exponent == 1 else 0.2)


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_values_are_never_above_the_exact_ones(passes: int) -> None:
    layer = Layer(150, 90, power(90, 0.5))
    svd = layer.sketch(20, passes).finish(8)
    assert bool((svd.S.double() <= layer.S[:8] * (1 + 1e-5)).all())


class Sizes(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel(), each.untyped_storage().nbytes() // each.element_size())
        return result


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", [(576, 800), (800, 576)])
def test_nothing_of_the_size_of_the_matrix_is_made(shape: tuple[int, int], passes: int) -> None:
    d_out, d_in = shape
    x, g = torch.randn(64, d_in), torch.randn(64, d_out)
    with Sizes() as sizes:
        sketch = GradientSketch(d_out, d_in, 22, passes)
        run(sketch, x.double(), g.bfloat16())
        sketch.finish(8)
    assert 64 * d_out <= sizes.largest <= _WIDEST * max(shape)
    assert sizes.largest < d_out * d_in / 4


# The widest start of several passes, or both sides of a core and sketch in one.
_WIDEST = module._WIDEST_START * 22 + 32


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (576, 576), (192, 576), (30, 2000), (9, 5)])
def test_memory_is_within_the_bound(shape: tuple[int, int], dtype: torch.dtype, passes: int) -> None:
    for width in (7, 22, 40):
        bound = sum(shape) * width * dtype.itemsize
        sketch = GradientSketch(*shape, width, passes, dtype=dtype)
        for number in range(passes):
            assert sum(tensor.nbytes for tensor in sketch.tensors()) <= sketch.bytes_held <= bound
            assert (sketch.bytes_shared > 0) == (number == 0)
            if number < passes - 1:
                sketch.advance()
        if width == 22 and min(shape) > 100:
            # It is also made use of.
            assert sketch.bytes_held > 0.85 * bound and sketch.rank_limit >= 16


@contextmanager
def counted_draws() -> Iterator[list[int]]:
    counts = [0]
    original = torch.randn

    def randn(*args: Any, **kwargs: Any) -> Tensor:
        counts[0] += 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        yield counts


def test_random_matrices_are_shared_and_let_go() -> None:
    gc.collect()
    before = len(module._shared)
    with counted_draws() as counts:
        sketches = [GradientSketch(40, 30, 12, 2, seed=123) for _ in range(3)]
        once = counts[0]
        assert once == len(module._shared) - before == 2
        GradientSketch(40, 30, 12, 2, seed=124)
        assert counts[0] == 2 * once
    # The transpose of a shape needs the same matrices.
    with counted_draws() as counts:
        GradientSketch(30, 40, 12, 2, seed=123)
        assert counts[0] == 0
    for sketch in sketches:
        sketch.advance()
    assert len(module._shared) == before


def test_same_seed_same_result_and_other_seed_another() -> None:
    layer = Layer(80, 60, power(60, 1.0))
    for passes in (1, 3):
        first, again, other = (layer.sketch(14, passes, seed=seed).finish(4) for seed in (7, 7, 8))
        # Not to the bit: where a tensor begins in memory decides how a product in float64 is rounded.
        for name in ("U", "S", "V"):
            torch.testing.assert_close(getattr(first, name), getattr(again, name), rtol=0, atol=1e-6)
        for name in ("norm", "residual", "angle_left", "angle_right", "share"):
            assert getattr(first, name) == pytest.approx(getattr(again, name), rel=1e-6)
        assert float((first.S - other.S).abs().max()) > 1e-5
        check(layer.sketch(14, passes, seed=-(2**70)).finish(2), 80, 60, 2)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    Layer(40, 30, power(30, 1.0)).sketch(12, 2, seed=99).finish(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_finish_and_tensors_change_nothing() -> None:
    sketch = Layer(60, 50, power(50, 1.0)).sketch(14, 3)
    before = [tensor.clone() for tensor in sketch.tensors()]
    first, wider, again = sketch.finish(3), sketch.finish(6), sketch.finish(3)
    torch.testing.assert_close(first.U, again.U, rtol=0, atol=1e-6)
    torch.testing.assert_close(first.S, wider.S[:3], rtol=1e-6, atol=0)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(before, sketch.tensors(), strict=True))


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_scale_makes_a_mean_of_a_sum(passes: int) -> None:
    layer = Layer(60, 50, power(50, 1.0))
    plain, scaled = layer.sketch(14, passes), layer.sketch(14, passes)
    scaled.scale(0.5)
    scaled.scale(0.25)
    sums, means = plain.finish(3), scaled.finish(3)
    torch.testing.assert_close(means.S, sums.S / 8, rtol=1e-6, atol=0)
    torch.testing.assert_close(means.U, sums.U, rtol=0, atol=1e-6)
    assert means.norm == pytest.approx(sums.norm / 8)
    for name in ("residual", "angle_left", "angle_right", "share"):
        assert getattr(means, name) == pytest.approx(getattr(sums, name), rel=1e-6)
    for factor in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="factor"):
            scaled.scale(factor)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("added", [False, True])
def test_a_zero_gradient_comes_out_as_one(passes: int, added: bool) -> None:
    sketch = GradientSketch(40, 30, 12, passes)
    run(sketch, torch.randn(5 if added else 0, 30), torch.zeros(5 if added else 0, 40))
    svd = sketch.finish(4)
    check(svd, 40, 30, 4)
    assert bool((svd.S == 0).all()) and svd.norm == svd.residual == svd.share == 0
    assert svd.angle_left == svd.angle_right == 1


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("size", [1e-16, 1e15])
def test_the_size_of_the_gradient_does_not_matter(size: float, passes: int) -> None:
    layer = Layer(60, 50, power(50, 1.0))
    plain, sized = layer.sketch(14, passes).finish(3), GradientSketch(60, 50, 14, passes)
    run(sized, layer.x.float(), layer.g.float() * size)
    svd = sized.finish(3)
    torch.testing.assert_close(svd.S / size, plain.S, rtol=1e-4, atol=0)
    assert svd.norm / size == pytest.approx(plain.norm, rel=1e-3)
    assert svd.angle_left == pytest.approx(plain.angle_left, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_and_nothing_else_is_lost(dtype: torch.dtype) -> None:
    layer = Layer(60, 50, torch.linspace(2, 1, 4, dtype=torch.float64))
    x, g = layer.x.to(dtype), layer.g.to(dtype)
    exact = g.double().mT @ x.double()
    sketch = GradientSketch(60, 50, 16, 2)
    # Neither autocast nor a graph of the inputs may touch the sums.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(sketch, x.clone().requires_grad_(), g)
    svd = sketch.finish(4)
    assert not svd.U.requires_grad and all(tensor.dtype == torch.float32 for tensor in sketch.tensors())
    assert float((product(svd) - exact).norm() / exact.norm()) < 2e-5


def test_sums_in_float64_are_as_exact() -> None:
    layer = Layer(60, 50, torch.linspace(2, 1, 4, dtype=torch.float64))
    for passes in (1, 2, 3):
        sketch = GradientSketch(60, 50, 16, passes, dtype=torch.float64)
        run(sketch, layer.x, layer.g)
        assert all(tensor.dtype == torch.float64 for tensor in sketch.tensors())
        assert sketch.finish(4).residual < 1e-11


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 60),
    d_in=st.integers(1, 60),
    width=st.integers(1, 30),
    passes=st.integers(1, 5),
    rank=st.integers(0, 6),
    tokens=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_any_shape_width_and_number_of_passes(
    d_out: int, d_in: int, width: int, passes: int, rank: int, tokens: int, seed: int
) -> None:
    try:
        sketch = GradientSketch(d_out, d_in, width, passes, seed=seed)
    except ValueError:
        assert width <= 2 * module.TEST_COLUMNS
        return
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(tokens, d_in, generator=generator), torch.randn(tokens, d_out, generator=generator)
    x[rank:] = 0
    bound = (d_out + d_in) * width * 4
    for number in range(passes):
        if number:
            sketch.advance()
        sketch.add(x, g)
        assert sketch.bytes_held <= bound
    exact = torch.linalg.svdvals((g.mT @ x).double())
    assert 1 <= sketch.rank_limit <= min(d_out, d_in, width)
    for k in {1, sketch.rank_limit}:
        svd = sketch.finish(k)
        check(svd, d_out, d_in, k)
        if min(rank, tokens) <= sketch.rank_limit:
            assert float((svd.S.double() - exact[:k]).abs().max()) <= 1e-3 * float(exact[0])


def test_more_width_than_the_least_always_fits() -> None:
    for shape in ((1, 1), (1, 500), (500, 1), (3, 4)):
        for passes in PASSES:
            assert GradientSketch(*shape, 2 * module.TEST_COLUMNS + 1, passes).rank_limit >= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x, g = torch.ones(3, 20), torch.ones(3, 30)
    g[1, 2] = bad
    for passes in (1, 2):
        sketch = GradientSketch(30, 20, 10, passes)
        sketch.add(x, g)
        with pytest.raises(ValueError, match="finite"):
            sketch.finish(1) if passes == 1 else sketch.advance()


def test_arguments_and_calls_out_of_place_are_refused() -> None:
    for arguments in ((0, 5, 10, 1), (5, 0, 10, 1), (5, 5, 10, 0)):
        with pytest.raises(ValueError, match="no sketch"):
            GradientSketch(*arguments)
    with pytest.raises(ValueError, match="bfloat16"):
        GradientSketch(5, 5, 10, 1, dtype=torch.bfloat16)
    for passes in (1, 2):
        with pytest.raises(ValueError, match="width of 1"):
            GradientSketch(50, 50, 1, passes)
    sketch = GradientSketch(30, 20, 10, 2)
    for x, g in ((20, 31), (21, 30)):
        with pytest.raises(ValueError, match="expected"):
            sketch.add(torch.ones(3, x), torch.ones(3, g))
    with pytest.raises(ValueError, match="expected"):
        sketch.add(torch.ones(3, 20), torch.ones(4, 30))
    with pytest.raises(RuntimeError, match="1 of 2"):
        sketch.finish(1)
    sketch.advance()
    with pytest.raises(RuntimeError, match="last"):
        sketch.advance()
    for k in (0, sketch.rank_limit + 1):
        with pytest.raises(ValueError, match="k must be"):
            sketch.finish(k)

"""LoRA-DA with a part left out, or ruling: no Fisher information (Remark 4.3), no variance, no bias."""

from __future__ import annotations

import pytest
import torch

from fisher import ATTENTION, draw, eye, layer, logspace, objective, of_spectrum, projector, published
from headstart.methods.base import Layer
from inputs import normal
from oracles import relative


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(12, 20, 4), (20, 12, 4), (7, 7, 7), (1, 9, 1), (30, 300, 5)])
def test_no_fisher_information_and_no_variance(d_out, d_in, r):
    G = normal(d_out, d_in, seed=3).float()
    method = published(variance=0, fisher="none")
    bare = Layer(name=ATTENTION, d_out=d_out, d_in=d_in, r=r, scaling=1.0, gradient=G)
    start = method.factors(bare)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    best = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    A0 = 32 * start.A.double().T
    assert float((A0.T @ A0 - eye(r)).abs().max()) < 5e-6
    assert float((projector(A0) - Vh[:r].T @ Vh[:r]).norm()) < 2e-3
    assert float((G.double() @ A0).square().sum()) == pytest.approx(float(S[:r].square().sum()), rel=1e-6)
    assert relative(start.B.double() @ start.A.double(), -best / float(S[0]) / 1024) < 1e-5
    assert relative(start.B, -G.double() @ A0 / float(S[0]) / 32) < 1e-5
    assert start.note == start.repair == ""
    plain = published(variance=0, fisher="none", normalize=False, gamma=16).factors(bare)
    assert relative(plain.B.double() @ plain.A.double(), -best / 16) < 1e-5
    # The same as Fisher information that says nothing.
    said = published(variance=0, damping=0).factors(layer(G, torch.eye(d_in), torch.ones(d_out), r))
    assert relative(said.B.double() @ said.A.double(), start.B.double() @ start.A.double()) < 1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_no_fisher_information_at_any_scale(scale):
    G = normal(9, 8, seed=1).float()
    method = published(variance=0, fisher="none")
    given_layers = [Layer(name=ATTENTION, d_out=9, d_in=8, r=2, scaling=1.0, gradient=grad) for grad in (G, G * scale)]
    plain, scaled = map(method.factors, given_layers)
    assert relative(scaled.B @ scaled.A, plain.B @ plain.A) < 1e-5


def test_fewer_directions_than_the_rank_without_fisher_information():
    """A gradient of rank one: the rest of A0 is any orthonormal completion, and its columns of B are zero."""
    G = torch.outer(normal(6, seed=1), normal(8, seed=2)).float()
    start = published(variance=0, fisher="none").factors(
        Layer(name=ATTENTION, d_out=6, d_in=8, r=3, scaling=1.0, gradient=G)
    )
    A0 = 32 * start.A.double().T
    assert float((A0.T @ A0 - eye(3)).abs().max()) < 5e-6
    assert relative(start.B @ start.A * 1024, -G.double() / float(torch.linalg.matrix_norm(G.double(), 2))) < 1e-5


@pytest.mark.parametrize("n", [10, 300])
def test_without_bias_the_leading_eigenvectors_of_the_inputs(n):
    values = logspace(-2, 2, n)
    values[-3:] *= 2
    Z = of_spectrum(values).float()
    G, _, Y = draw(6, n, seed=1)
    start = published(bias=0).factors(layer(G, Z, Y, 3))
    leading = torch.linalg.eigh(Z.double()).eigenvectors[:, -3:]
    assert float((projector(start.A.double().T) - leading @ leading.T).norm()) < 5e-3
    assert objective(Z.double(), 32 * start.A.double().T) == pytest.approx(float(values[-3:].sum()), rel=1e-5)


def test_without_variance_the_leading_right_singular_vectors_of_delta():
    G, Z, Y = draw(12, 15, seed=1)
    start = published(variance=0).factors(layer(G, Z, Y, 3, population=7))
    delta = -G.double() / (Y.double() + 1e-6)[:, None] @ torch.linalg.inv(Z.double() + 1e-6 * eye(15))
    U, S, Vh = torch.linalg.svd(delta)
    assert float((projector(start.A.double().T) - Vh[:3].T @ Vh[:3]).norm()) < 1e-4
    best = U[:, :3] @ torch.diag(S[:3]) @ Vh[:3]
    assert relative(start.B @ start.A, best / float(S[0]) / 1024) < 1e-5


def test_an_endless_training_set_leaves_no_variance():
    G, Z, Y = draw(12, 15, seed=2)
    none = published(variance=0).factors(layer(G, Z, Y, 3))
    expected = projector(none.A.double().T)
    starts = [published(variance=1).factors(layer(G, Z, Y, 3, population=N)) for N in (1, 10**3, 10**6, 10**12)]
    distances = [float((projector(start.A.double().T) - expected).norm()) for start in starts]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1e-3 and distances[-1] < 1e-5


@pytest.mark.parametrize("factor", [2, 100])
def test_the_weight_of_the_variance_and_the_training_set_trade_off(factor):
    G, Z, Y = draw(6, 8, seed=2)
    one = published(variance=0.03 * factor).factors(layer(G, Z, Y, 3, population=10 * factor))
    other = published(variance=0.03).factors(layer(G, Z, Y, 3, population=10))
    assert relative(one.B @ one.A, other.B @ other.A) < 1e-5


def test_weights_count_by_their_ratio():
    G, Z, Y = draw(6, 8, seed=2)
    one, other = (published(variance=c, bias=b).factors(layer(G, Z, Y, 3)) for c, b in ((0.3, 1), (3, 10)))
    assert relative(one.B @ one.A, other.B @ other.A) < 1e-5
    assert other.info["objective"] == pytest.approx(10 * one.info["objective"], rel=1e-9)

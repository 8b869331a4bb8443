"""What Linformer's paper (arXiv 2006.04768) proves of its projections, measured in float64.

Theorem 1: of softmax weights P (n, n) the product with a column w of the values is kept by P~ = P R^T R, R (k, n) of
N(0, 1 / k), with k = 5 log(n) / (eps^2 - eps^3): |P~ w - P w| <= eps |P w| with high probability. The step of its proof
that gives k is the lemma of Johnson and Lindenstrauss, for rows u of P; and what that lemma says of a product is

    |u R^T R w - u w| <= eps |u| |w|            and not, as the proof has it,   eps |u w|

Here the first is held to, at the proof's k, and the second is shown not to hold.
"""

import math

import pytest
import torch

LENGTH, SIZE, EPSILON, DRAWS = 1024, 32, 0.5, 6
RANKS = (16, 64, 256, 1024)
BOUND = math.ceil(5 * math.log(LENGTH) / (EPSILON**2 - EPSILON**3))


def attention(sharpness):
    """Return random softmax weights (n, n), whose scores have this standard deviation, and values (n, d)."""
    q, k, v = (torch.randn(LENGTH, SIZE, dtype=torch.float64) for _ in range(3))
    return (sharpness * q @ k.T / SIZE**0.5).softmax(1), v


def errors(weights, values, rank):
    """Return P~ V - P V, (n, d)."""
    r = torch.randn(rank, LENGTH, dtype=torch.float64) / rank**0.5
    return weights @ r.T @ (r @ values) - weights @ values


def products(weights, values):
    """Return |u| |w| (n, d), for every row u of P and column w of V."""
    return weights.norm(dim=1)[:, None] * values.norm(dim=0)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_the_error_falls_with_the_root_of_the_rank(sharpness):
    weights, values = attention(sharpness)
    scale = products(weights, values)
    found = [(errors(weights, values, rank) / scale).square().mean().sqrt() for rank in RANKS for _ in range(DRAWS)]
    y = torch.stack(found).view(len(RANKS), DRAWS).log().mean(1)
    x = torch.tensor(RANKS, dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    sizes = [round(float(e), 3) for e in y.exp()]
    print(f"sharpness {sharpness}: errors over |u| |w| at k = {RANKS}: {sizes}, slope {slope:.3f}")
    assert -0.62 < slope < -0.38
    assert float(y[-1].exp()) == pytest.approx(RANKS[-1] ** -0.5, rel=0.5)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_at_the_proofs_rank_products_are_within_epsilon_of_norms_and_not_of_themselves(sharpness):
    weights, values = attention(sharpness)
    off = errors(weights, values, BOUND)
    worst = float((off.abs() / products(weights, values)).max())
    of_product = float(off.norm() / (weights @ values).norm())
    print(f"sharpness {sharpness}: k = {BOUND}: at most {worst:.2f} of |u| |w|; of |P w| {of_product:.2f}")
    assert worst <= EPSILON
    assert of_product > EPSILON, "as the theorem is written it would be below"

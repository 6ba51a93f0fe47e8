"""Normal equations against brute force and hand values: their ridge, their error and what is held out."""

import math

import numpy as np
import pytest
import torch

from paper_src.least_squares import NormalEquations, solved


def equations(inputs=2, outputs=2, **gain):
    return NormalEquations.empty(inputs, outputs, torch.device("cpu"), **gain)


def drawn(slope, seed, count=40):
    """Equations of noisy y = slope x."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, 2, generator=generator)
    sums = equations()
    sums.add(x, slope * x + 0.1 * noise, torch.ones(count))
    return sums


def test_least_squares_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    weights = torch.rand(50, generator=generator, dtype=torch.float64) + 0.1
    moments = equations(4, 3)
    for low in range(0, 50, 7):
        moments.add(x[low : low + 7], y[low : low + 7], weights[low : low + 7])
    root = weights.sqrt()[:, None]
    expected = np.linalg.lstsq((root * x).numpy(), (root * y).numpy())[0]
    found = moments.solve(1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)  # products in float32
    error = float((root * (y - x @ found)).square().sum()) / 50
    assert moments.error(found) == pytest.approx(error, rel=1e-5)
    assert moments.error(torch.zeros(4, 3, dtype=torch.float64)) == pytest.approx(
        float((root * y).square().sum()) / 50, rel=1e-5
    )


def test_a_large_ridge_leaves_the_weights_as_they_were():
    moments = equations()
    moments.add(torch.eye(2), torch.ones(2, 2), torch.ones(2))
    assert moments.solve(1e9).abs().max() < 1e-8


def test_diagonal_solution_by_hand():
    moments = equations()
    moments.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 9.0], [1.0, 9.0]]), torch.ones(2))
    expected = torch.tensor([4 / 10, 54 / 20], dtype=torch.float64).diag()
    torch.testing.assert_close(moments.solve(0.0, diagonal=True), expected)


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_ridge_is_in_the_unit_of_each_feature(diagonal):
    """Of features of any size a ridge of 1 takes half."""
    moments = equations()
    moments.add(torch.tensor([[1.0, 0.0], [0.0, 100.0]]), torch.tensor([[3.0, 0.0], [0.0, 50.0]]), torch.ones(2))
    torch.testing.assert_close(moments.solve(1.0, diagonal), moments.solve(0.0, diagonal) / 2)


def test_the_solution_is_of_all_tokens_by_the_ridge_that_the_held_out_ones_choose():
    fitted, held_out = drawn(1.0, 0), drawn(1.1, 5)
    found, row = solved(fitted, held_out, False)
    torch.testing.assert_close(found, (fitted + held_out).solve(row["ridge"]))


def test_nothing_is_changed_where_no_ridge_brings_held_out_tokens_nearer():
    found, row = solved(drawn(1.0, 0), drawn(-1.0, 5), False)
    assert not found.any()
    assert row["ridge"] == math.inf and row["error_after"] == row["error_before"]


def test_the_error_counts_each_output_by_its_gain():
    gain, generator = torch.tensor([2.0, 0.5]), torch.Generator().manual_seed(0)
    moments = equations(gain=gain)
    x, y = torch.randn(2, 9, 2, generator=generator)
    solution = torch.randn(2, 2, generator=generator)
    moments.add(x, y, torch.ones(9))
    expected = float((gain * (y - x @ solution)).square().sum()) / 9
    assert moments.error(solution.double()) == pytest.approx(expected, rel=1e-4)

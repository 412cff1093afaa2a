"""Conjugate gradient and line search: against a direct solve, and every learner as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional.trust_region import conjugate_gradient, line_search, step_within


def problems(*learners: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Symmetric positive definite matrices and right-hand sides, in float64."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(*learners, size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(size, dtype=torch.float64)
    return matrix, torch.randn(*learners, size, generator=generator, dtype=torch.float64)


def times(matrix: Tensor):
    return lambda vector: (matrix @ vector.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("learners", [(), (3,), (2, 3), (6,)])
def test_as_many_products_as_unknowns_solve_the_system(learners: tuple[int, ...]) -> None:
    matrix, target = problems(*learners)
    found = conjugate_gradient(times(matrix), target, 12, tolerance=1e-26)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), rtol=1e-9, atol=1e-9)


def test_every_learner_stops_for_itself() -> None:
    """One whose matrix has two different eigenvalues is done after two products, and stays there bit for bit."""
    matrix, target = problems(3)
    matrix[1] = torch.diag(torch.tensor([1.0, 1, 1, 4, 4, 4], dtype=torch.float64))
    target[2] = 0.0
    two, many = (conjugate_gradient(times(matrix), target, n, tolerance=1e-20) for n in (2, 9))
    assert torch.equal(two[1], many[1]) and not torch.equal(two[0], many[0])
    torch.testing.assert_close(two[1], target[1] / matrix[1].diagonal())
    assert torch.equal(many[2], torch.zeros(6, dtype=torch.float64))
    for i in range(3):
        alone = conjugate_gradient(times(matrix[i]), target[i], 9, tolerance=1e-20)
        torch.testing.assert_close(many[i], alone, rtol=1e-9, atol=1e-9)


def test_a_learner_of_nan_disturbs_no_other() -> None:
    matrix, target = problems(3)
    whole = conjugate_gradient(times(matrix), target, 5)
    target[1] = torch.nan
    broken = conjugate_gradient(times(matrix), target, 5)
    assert torch.equal(whole[0], broken[0]) and torch.equal(whole[2], broken[2]) and broken[1].isnan().any()


def test_a_step_is_as_long_as_the_divergence_allows() -> None:
    matrix, direction = problems(3)
    limit = torch.tensor([0.01, 0.5, 2.0], dtype=torch.float64)
    step = step_within(limit, direction, times(matrix)(direction))
    torch.testing.assert_close(0.5 * (step * times(matrix)(step)).sum(-1), limit)
    assert (step * direction).sum(-1).min() > 0
    assert torch.equal(step_within(0.1, 0 * direction, 0 * direction), 0 * direction)


def test_the_line_search_takes_the_longest_step_that_helps_and_fits() -> None:
    """Objective -(x - 1)^2 and divergence x^2, from 0: learner by learner another reason to go back."""
    start = torch.zeros(4, 1, dtype=torch.float64)
    step = torch.tensor([[1.5], [4.0], [1.0], [-1.0]], dtype=torch.float64)
    limit = torch.tensor([9.0, 9.0, 0.3, 9.0], dtype=torch.float64)
    tried = []

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        tried.append(x)
        return -(x - 1).square().squeeze(-1), x.square().squeeze(-1)

    found = line_search(evaluate, start, step, limit, 4, shrink=0.5)
    assert found.fraction.tolist() == [1.0, 0.25, 0.5, 0.0]
    assert found.point.flatten().tolist() == [1.5, 1.0, 0.5, 0.0]
    assert len(tried) == 5, "the start, and as many tries for everyone"


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    start = torch.tensor([[1.0], [2.0]])
    step = torch.tensor([[torch.nan], [1.0]])
    found = line_search(lambda x: (x.sum(-1), torch.zeros(2)), start, step, 1.0, 3)
    assert found.point.tolist() == [[1.0], [3.0]] and found.fraction.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("number", [0, 2.0, True])
def test_numbers_that_count_nothing_are_refused(number: object) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(SettingError, match="at least 1"):
        conjugate_gradient(lambda v: v, x, number)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="at least 1"):
        line_search(lambda v: (v[:, 0], v[:, 0]), x, x, 1.0, number)  # type: ignore[arg-type]

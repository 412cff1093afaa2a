"""Projections against scipy: duplicates, combinations, more constraints than dimensions, tiny scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from scipy.optimize import minimize, nnls

from rlmeta.functional.projection import nonnegative_quadratic, project, project_average, projection_weights


def problem(kind: str, constraints: int, dimensions: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A gradient `[P]` and references `[K, P]`."""
    generator = torch.Generator().manual_seed(seed)
    references = torch.randn(constraints, dimensions, generator=generator, dtype=torch.float64)
    gradient = torch.randn(dimensions, generator=generator, dtype=torch.float64)
    if kind == "duplicates":
        references[constraints // 2 :] = references[: constraints - constraints // 2].clone()
    if kind == "combinations":
        rank = max(1, constraints // 3)
        mix = torch.randn(constraints, rank, generator=generator, dtype=torch.float64)
        references = mix @ references[:rank]
    if kind == "opposed":
        references[constraints // 2 :] = -references[: constraints - constraints // 2].clone()
    if kind == "scales":
        references = references * 10.0 ** torch.randint(-8, 3, (constraints, 1), generator=generator)
        gradient = gradient * 1e-8
    if kind == "zeros":
        references[::2] = 0
    return gradient, references


def check(gradient: torch.Tensor, references: torch.Tensor, projected: torch.Tensor) -> None:
    """The conditions of Karush, Kuhn and Tucker, relative to the norms."""
    norms = references.norm(dim=-1).clamp(min=1e-300)
    unit, size = references / norms.unsqueeze(-1), gradient.norm()
    slack = unit @ projected / size
    assert slack.min() >= -1e-9
    if bool((references @ gradient >= 0).all()):
        assert torch.equal(projected, gradient)
    # the move is a nonnegative combination of the constraints that hold with equality: scipy's NNLS leaves no residual
    move, tight = ((projected - gradient) / size).numpy(), (unit[slack.abs() < 1e-7]).numpy()
    if np.abs(move).max() > 0:
        assert nnls(tight.T, move)[1] < 1e-7
    # and as near as scipy's solution of the dual
    ours = (projected - gradient).norm() / size
    best = nnls(unit.T.numpy(), -(gradient / size).numpy())
    np.testing.assert_allclose(ours, np.linalg.norm(unit.T.numpy() @ best[0]), atol=1e-8)
    np.testing.assert_allclose(projected / size, gradient / size + unit.T @ torch.from_numpy(best[0]), atol=1e-7)


@pytest.mark.parametrize("kind", ["plain", "duplicates", "combinations", "opposed", "scales", "zeros"])
@pytest.mark.parametrize(("constraints", "dimensions"), [(1, 5), (2, 2), (5, 40), (20, 60), (30, 12)])
def test_projection_meets_its_constraints_and_equals_scipy(kind, constraints, dimensions):
    for seed in range(4):
        gradient, references = problem(kind, constraints, dimensions, seed)
        check(gradient, references, project(gradient, references))


@settings(max_examples=60, deadline=None)
@given(
    constraints=strategies.integers(1, 30),
    dimensions=strategies.integers(1, 40),
    kind=strategies.sampled_from(["plain", "duplicates", "combinations", "opposed", "scales", "zeros"]),
    seed=strategies.integers(0, 10_000),
)
def test_projection_of_any_shape_meets_its_constraints(constraints, dimensions, kind, seed):
    gradient, references = problem(kind, constraints, dimensions, seed)
    check(gradient, references, project(gradient, references))


@pytest.mark.parametrize("seed", range(5))
def test_projection_equals_slsqp(seed):
    gradient, references = problem("plain", 6, 8, seed)
    g, r = gradient.numpy(), references.numpy()
    solution = minimize(
        lambda z: 0.5 * np.square(z - g).sum(),
        np.zeros(8),
        jac=lambda z: z - g,
        constraints={"type": "ineq", "fun": lambda z: r @ z, "jac": lambda z: r},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(project(gradient, references).numpy(), solution.x, atol=1e-6)


@pytest.mark.parametrize("learners", [(5,), (5, 5), ()])
def test_batched_equals_looped(learners):
    count = int(np.prod(learners))
    kinds = ["plain", "duplicates", "combinations", "scales", "zeros"]
    problems = [problem(kinds[i % 5], 5, 5, i) for i in range(count)]
    gradient = torch.stack([g for g, _ in problems]).reshape(*learners, 5)
    references = torch.stack([r for _, r in problems]).reshape(*learners, 5, 5)
    margin = torch.linspace(0, 1, count, dtype=torch.float64).reshape(learners)
    together = project(gradient, references, margin).reshape(count, 5)
    for i, (g, r) in enumerate(problems):
        alone = project(g, r, margin.reshape(-1)[i])
        torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("margin", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_margin_is_the_lower_bound_of_the_multipliers_as_in_the_reference_code(margin, seed):
    gradient, references = problem("plain", 4, 9, seed)
    if bool((references @ gradient >= 0).all()):
        assert torch.equal(project(gradient, references, margin), gradient)
        return
    p, q = (references @ references.T).numpy(), (references @ gradient).numpy()
    solution = minimize(
        lambda v: 0.5 * v @ p @ v + q @ v,
        np.full(4, margin),
        jac=lambda v: p @ v + q,
        bounds=[(margin, None)] * 4,
        method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-12},
    )
    expected = gradient.numpy() + solution.x @ references.numpy()
    np.testing.assert_allclose(project(gradient, references, margin).numpy(), expected, atol=1e-5)
    v = projection_weights(references @ references.T, references @ gradient, gradient.square().sum(), margin)
    assert v.min() >= margin * (1 - 1e-12)


def test_single_precision_is_good_to_its_rounding():
    for kind in ("plain", "duplicates", "combinations", "scales"):
        gradient, references = problem(kind, 20, 400, 1)
        gradient, references = gradient.float(), references.float()
        projected = project(gradient, references)
        norms = references.norm(dim=-1) * gradient.norm()
        assert ((references @ projected) / norms).min() > -1e-4


def test_one_constraint_is_the_closed_form_of_a_gem():
    gradient, references = problem("plain", 5, 7, 3)
    gradient = torch.stack([gradient, -gradient, gradient, -gradient, gradient])
    expected = project_average(gradient, references)
    torch.testing.assert_close(project(gradient, references.unsqueeze(-2)), expected)
    products = (expected * references).sum(-1)
    assert products.min() > -1e-12
    kept = (gradient * references).sum(-1) >= 0
    assert kept.any() and not kept.all()
    assert torch.equal(expected[kept], gradient[kept])


def test_zero_gradient_and_no_reference_stay_finite():
    zero, references = torch.zeros(4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(project(zero, references), zero)
    assert torch.equal(project_average(zero, torch.zeros_like(zero)), zero)
    gradient = torch.randn(4, dtype=torch.float64)
    assert torch.equal(project(gradient, torch.zeros(3, 4, dtype=torch.float64), 0.5), gradient)
    with pytest.raises(ValueError, match="expected"):
        project(gradient, torch.zeros(3, 5, dtype=torch.float64))


def test_nonnegative_quadratic_leaves_variables_that_only_cost_at_zero():
    p = torch.eye(3, dtype=torch.float64)
    v = nonnegative_quadratic(p, torch.tensor([[-1.0, 2.0, 0.0]], dtype=torch.float64))
    assert v.tolist() == [[1.0, 0.0, 0.0]]


def test_a_variable_that_enters_by_a_rounding_error_keeps_no_other_out():
    """The third constraint is a combination of the first two but for an error that makes P indefinite: its slope says
    that it should enter, and entering it would be negative. The fourth, whose slope is smaller, has its turn after."""
    p = torch.eye(4, dtype=torch.float64)
    p[2, 0] = p[0, 2] = 0.8 * (1 + 1e-9)
    p[2, 1] = p[1, 2] = -0.6
    assert torch.linalg.eigvalsh(p)[0] < 0
    v = nonnegative_quadratic(p, torch.tensor([-1.0, -1.0, -0.2 - 1e-6, -5e-7], dtype=torch.float64))
    expected = torch.tensor([1.0, 1.0, 0.0, 5e-7], dtype=torch.float64)
    torch.testing.assert_close(v, expected, rtol=1e-9, atol=0.0)

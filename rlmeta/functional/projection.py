"""Gradient projection of GEM and A-GEM: the nearest gradient that opposes no reference gradient.

GEM: of all g̃ with ⟨g̃, gₖ⟩ >= 0 for every reference gradient gₖ, the one nearest to g. By duality g̃ = g + Σ vₖ gₖ, where
v >= 0 minimises ½ vᵀ P v + qᵀ v with P = G Gᵀ and q = G g: as many unknowns as reference gradients, whatever the number
of weights.

Sources: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", 2017; Chaudhry et al., "Efficient
Lifelong Learning with A-GEM", 2019; Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(gradient: Tensor, references: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """GEM's gradient projection: the gradient nearest to `gradient` with no negative product with any reference.

    Args:
        gradient: `[*L, P]`.
        references: `[*L, K, P]`; rows of zeros constrain nothing.
        margin: v >= margin instead of v >= 0 where a constraint is violated, which bends the step towards the
            references (the paper's memory strength); a number or `[*L]`.

    Returns:
        `[*L, P]`; learners that violate no constraint get their gradient back, bit for bit.

    Raises:
        ValueError: the shapes disagree.
    """
    if references.shape[:-2] + references.shape[-1:] != gradient.shape:
        expected = (*gradient.shape[:-1], "K", gradient.shape[-1])
        raise ValueError(f"references have shape {tuple(references.shape)}, expected {expected}")
    gram = references @ references.mT
    products = (references @ gradient.unsqueeze(-1)).squeeze(-1)
    v = projection_weights(gram, products, gradient.square().sum(-1), margin)
    moved = gradient + (v.unsqueeze(-2) @ references).squeeze(-2)
    return torch.where((products < 0).any(-1, keepdim=True), moved, gradient)


def projection_weights(gram: Tensor, products: Tensor, square: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """Dual variables v of the projection g + Σ vₖ gₖ; 0 for learners that violate no constraint.

    Args:
        gram: Gram matrix P = ⟨gⱼ, gₖ⟩, `[*L, K, K]`; in single precision it is good to about 1e-6 of the norms.
        products: q = ⟨gₖ, g⟩, `[*L, K]`.
        square: ⟨g, g⟩, `[*L]`.
        margin: lower bound of v, a number or `[*L]`.

    Returns:
        `[*L, K]` in the dtype of `gram`.
    """
    precision = torch.finfo(gram.dtype).eps
    p, q = gram.double(), products.double()
    norms = p.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    size = square.double().sqrt().unsqueeze(-1)
    ones, real = torch.ones_like(norms), norms > 0
    scale = torch.where(real, norms, ones)  # unit constraints and a unit gradient: scales of 1e-8 are as good as 1
    p = p / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    q = q / (scale * torch.where(size > 0, size, torch.ones_like(size)))
    violated = (products < 0).any(-1, keepdim=True) & (size > 0)
    low = torch.as_tensor(margin, dtype=torch.float64, device=gram.device)
    low = torch.where(real, low.unsqueeze(-1) if low.dim() else low, 0.0) * scale / torch.where(size > 0, size, 1.0)
    shifted = q + (p @ low.unsqueeze(-1)).squeeze(-1)
    v = low + nonnegative_quadratic(p, torch.where(real & violated, shifted, ones), 100 * precision)
    return torch.where(violated, v * size / scale, torch.zeros_like(v)).to(gram.dtype)


def nonnegative_quadratic(p: Tensor, q: Tensor, tolerance: float = 1e-14) -> Tensor:
    """Nonnegative quadratic programs: v >= 0 that minimises ½ vᵀ P v + qᵀ v, for a batch of problems.

    P may be singular: constraints may repeat, be combinations of others, or outnumber the dimensions.

    Args:
        p: positive semidefinite `[*L, K, K]` float64 with ones, or zeros, on its diagonal.
        q: `[*L, K]` float64, in the range of P for there to be a minimum.
        tolerance: a slope above minus this counts as 0.

    Returns:
        `[*L, K]`
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    v, solved = _exchange(p, q, eye, tolerance)
    return v if bool(solved.all()) else torch.where(solved.unsqueeze(-1), v, _active_sets(p, q, eye, tolerance, solved))


def _exchange(p: Tensor, q: Tensor, eye: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Block principal pivoting: all variables of the wrong sign switch at once, which may fail where P is singular.

    Args:
        p: as for `nonnegative_quadratic`.
        q: as for `nonnegative_quadratic`.
        eye: identity matrix `[K, K]`.
        tolerance: as for `nonnegative_quadratic`.

    Returns:
        v `[*L, K]`, and whether it is the minimiser, `[*L]`.
    """
    free = q < -tolerance
    for exchange in range(12):
        s = _minimiser(p, q, free, eye)
        slope = q + (p @ s.unsqueeze(-1)).squeeze(-1)
        wrong = torch.where(free, s < 0, slope < -tolerance)
        if exchange >= 3 and not bool(wrong.any()):  # not before: a recorded step holds for few outcomes
            break
        free = free ^ wrong
    exact = torch.where(free, slope.abs() <= tolerance * (1 + s.sum(-1, keepdim=True)), True)
    return s, (exact & ~wrong).all(-1)


def _active_sets(p: Tensor, q: Tensor, eye: Tensor, tolerance: float, solved: Tensor) -> Tensor:
    """Active-set method of Lawson and Hanson: one variable enters at a time, while the objective falls with it.

    The block of P of the free variables thereby stays regular although P itself is singular.

    Args:
        p: as for `nonnegative_quadratic`.
        q: as for `nonnegative_quadratic`.
        eye: identity matrix `[K, K]`.
        tolerance: as for `nonnegative_quadratic`.
        solved: `[*L]` bool, problems that are solved already and left at 0.

    Returns:
        v, `[*L, K]`
    """
    size = q.shape[-1]
    places = torch.arange(size, device=q.device)
    v, free, refused = torch.zeros_like(q), torch.zeros_like(q, dtype=torch.bool), torch.zeros_like(q, dtype=torch.bool)
    last = torch.full(q.shape[:-1], -1, dtype=torch.int64, device=q.device)  # the variable that entered last
    running = ~solved
    for _ in range(20 * size + 20):
        s = _minimiser(p, q, free, eye)
        entered, bad = places == last.unsqueeze(-1), free & (s <= 0)
        useless = (entered & bad & (v <= 0)).any(-1)  # it entered by a rounding error
        inside = ~bad.any(-1)
        # towards the minimiser, as far as every variable stays positive
        part = torch.where(bad, v / (v - s).clamp(min=1e-300), torch.ones_like(v))
        ratio = part.amin(-1, keepdim=True)
        moved = torch.where(inside.unsqueeze(-1), s, v + ratio * (s - v))
        moved = torch.where((running & ~useless).unsqueeze(-1), moved, v)
        dropped = torch.where(useless.unsqueeze(-1), entered, bad & (part <= ratio))
        refused = torch.where(useless.unsqueeze(-1), refused | entered, refused & ~inside.unsqueeze(-1))
        free = free & ~(dropped & running.unsqueeze(-1))
        v = torch.where(free, moved, torch.zeros_like(v))
        slope = q + (p @ v.unsqueeze(-1)).squeeze(-1)
        open_ = ~free & ~refused & (slope < -tolerance)
        ready = running & (inside | useless)
        running = running & ~(ready & ~open_.any(-1))
        if not bool(running.any()):
            break
        best = torch.where(open_, slope, torch.full_like(slope, torch.inf)).argmin(-1)
        last = torch.where(ready & running, best, torch.full_like(best, -1))
        free = free | (places == last.unsqueeze(-1))
    return v


def _minimiser(p: Tensor, q: Tensor, free: Tensor, eye: Tensor) -> Tensor:
    """Minimiser over the free variables, with the others at 0, `[*L, K]`."""
    both = free.unsqueeze(-1) & free.unsqueeze(-2)
    s: Tensor = torch.linalg.solve_ex(torch.where(both, p, eye), torch.where(free, -q, torch.zeros_like(q)))[0]
    return torch.where(free, torch.nan_to_num(s, nan=-1.0), torch.zeros_like(s))


def project_average(gradient: Tensor, reference: Tensor) -> Tensor:
    """A-GEM's gradient projection: g - ⟨g, r⟩ / ⟨r, r⟩ r where ⟨g, r⟩ < 0, else g, bit for bit.

    Args:
        gradient: g, `[*L, P]`.
        reference: r, the gradient on a sample of all memories, `[*L, P]`.

    Returns:
        `[*L, P]`
    """
    product = (gradient * reference).sum(-1, keepdim=True)
    square = reference.square().sum(-1, keepdim=True)
    factor = product / torch.where(square > 0, square, torch.ones_like(square))
    return torch.where(product < 0, gradient - factor * reference, gradient)

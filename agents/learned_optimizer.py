"""A learned optimizer: an LSTM that turns the gradient of each variable into its update, the same for all variables.

    minimise over φ  E_f mean over t of f(xₜ),   xₜ₊₁ = xₜ + 0.1 LSTM(features(∇f(xₜ)), memoryₜ; φ)

Truncated backpropagation: every `unroll` steps φ moves along the gradient of the piece's mean loss. ∇f(xₜ) counts as a
constant, so what φ did shows in the sum of the updates and in the LSTM's memory. The problems of a meta-batch are
minimised side by side, `[seeds, problems]`, each at its own place of its own `horizon`.

Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016.

python agents/learned_optimizer.py --seeds 2 --steps 320000
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from rlmeta.envs.minimisation import Quadratics
from rlmeta.functional import optim, random, tree
from rlmeta.functional.axes import align
from rlmeta.nn import Context, Linear, LSTMCell, Params, stack


@dataclass(frozen=True)
class Settings:
    """What may be changed."""

    problems: int = 16
    """Minimised at once."""
    horizon: int = 100
    """Steps after which a problem is left for a new one."""
    unroll: int = 20
    """Steps between two meta-updates."""
    meta_rate: float = 3e-3
    """Adam's, annealed to 0 in a straight line."""
    max_grad_norm: float = 1.0


SETTINGS = Settings()
FAMILY = Quadratics(dimensions=10)
"""f(x) = ‖W x - y‖² with random W, y and start."""
HIDDEN, SCALE = 20, 0.1


def network() -> nn.ModuleDict:
    """Two layers of LSTM and a linear one; a row of their input is one variable of one problem."""
    cells = {"first": LSTMCell(2, HIDDEN), "second": LSTMCell(HIDDEN, HIDDEN)}
    return nn.ModuleDict({**cells, "output": Linear(HIDDEN, 1)})


NET = network()


def features(gradient: Tensor, k: float = 10.0) -> Tensor:
    """A gradient of any size as two moderate numbers: (log |g| / k, sign g), or (-1, eᵏ g) where |g| < e⁻ᵏ."""
    smallest = math.exp(-k)
    large, logarithm = gradient.abs() >= smallest, gradient.abs().clamp(min=smallest).log() / k
    return torch.stack([logarithm, torch.where(large, gradient.sign(), gradient / smallest)], -1)


def lstm(phi: Params, x: Tensor, memory: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """From features `[seeds, K, D, 2]` to updates `[seeds, K, D]`, and the memory after them."""
    # Context(): evaluation; phi is of all three, and the last argument what its names begin with
    first = NET["first"].run(phi, {"input": x, **memory["first"]}, Context(), "first.")
    second = NET["second"].run(phi, {"input": first["hidden"], **memory["second"]}, Context(), "second.")
    output = NET["output"].run(phi, second["hidden"], Context(), "output.")
    return SCALE * output.squeeze(-1), {"first": first, "second": second}


def objective(x: Tensor, problem: dict[str, Tensor]) -> Tensor:
    """f of every problem, `[seeds, K]`."""
    return ((problem["matrix"] @ x.unsqueeze(-1)).squeeze(-1) - problem["target"]).square().sum(-1)


def begin(problem: dict[str, Tensor]) -> dict[str, Any]:
    """Problems `[seeds, K, ...]` at their start, with an empty memory."""
    zero = problem["start"].new_zeros(*problem["start"].shape, HIDDEN)
    memory = {layer: {"hidden": zero, "cell": zero} for layer in ("first", "second")}
    age = torch.zeros(zero.shape[:2], dtype=torch.int64)
    return {"problem": problem, "x": problem["start"], "memory": memory, "age": age}


def minimise(phi: Params, carry: dict[str, Any], steps: int) -> tuple[Tensor, dict[str, Any]]:
    """Steps of the optimizer on every problem: f after each, `[steps, seeds, K]`, and where that leads."""
    x, memory, losses = carry["x"], carry["memory"], []
    for _ in range(steps):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(point, carry["problem"]).sum(), point)
        move, memory = lstm(phi, features(gradient), memory)
        x = x + move
        losses.append(objective(x, carry["problem"]))
    return torch.stack(losses), {**carry, "x": x, "memory": memory, "age": carry["age"] + steps}


def update(
    phi: Params, moments: optim.State, carry: dict[str, Any], rate: float, s: Settings = SETTINGS
) -> tuple[Params, optim.State, dict[str, Any]]:
    """A piece of every problem's minimisation, and one step of φ along the gradient through it."""
    theta = {name: weight.detach().requires_grad_() for name, weight in phi.items()}
    losses, carry = minimise(theta, carry, s.unroll)
    # a sum over seeds, which share no weight: each gets the gradient of its own mean loss
    total = losses.mean((0, 2)).sum()
    gradient = dict(zip(theta, torch.autograd.grad(total, list(theta.values()))))
    gradient, _ = optim.clip_by_norm(gradient, s.max_grad_norm, learner_axes=1)
    updates, moments = optim.adam(rate).update(gradient, moments, phi)
    return optim.apply_updates(phi, updates), moments, tree.map(torch.Tensor.detach, carry)


def renew(carry: dict[str, Any], fresh: dict[str, Any], s: Settings = SETTINGS) -> dict[str, Any]:
    """Fresh problems in the place of those that are through."""
    over = carry["age"] >= s.horizon
    return tree.map(lambda new, old: torch.where(align(over, new), new, old), fresh, carry)


def train(seeds: int = 2, steps: int = 320_000, s: Settings = SETTINGS) -> Params:
    """Meta-train `seeds` optimizers at once for so many steps on problems; returns φ `[seeds, ...]`."""
    keys = random.make_keys(range(seeds))
    phi = stack(network, keys)
    moments, iterations = optim.adam(s.meta_rate).init(phi, (seeds,)), -(-steps // (s.problems * s.unroll))
    carry = begin(FAMILY.tasks(keys, 0, s.problems, "train"))
    carry["age"] = carry["age"] + s.unroll * (torch.arange(s.problems) % (s.horizon // s.unroll))  # spread out
    for i in range(iterations):
        carry = renew(carry, begin(FAMILY.tasks(keys, i, s.problems, "train")), s)
        phi, moments, carry = update(phi, moments, carry, s.meta_rate * (1 - i / iterations), s)
    return phi


@torch.no_grad()
def evaluate(phi: Params, problems: int = 256, steps: int = 100) -> Tensor:
    """The mean f of held-out problems after 0 ... `steps` steps, `[seeds, steps + 1]`."""
    keys = random.make_keys(range(len(phi["output.bias"])))
    carry = begin(FAMILY.tasks(keys, 0, problems, "test"))
    losses, _ = minimise(phi, carry, steps)
    return torch.cat([objective(carry["x"], carry["problem"]).unsqueeze(0), losses]).mean(-1).T


def main(seeds: int = 2, steps: int = 320_000) -> None:
    """Meta-train, print every seed's mean loss (rows) after 0, 20, ... 100 steps on held-out problems (columns)."""
    print(evaluate(train(seeds, steps))[:, ::20])


if __name__ == "__main__":
    tyro.cli(main)

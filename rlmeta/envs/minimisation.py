"""Families of optimisation problems, on which learned optimizers are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlmeta.data.sets import labelled
from rlmeta.envs.task_families import Split, Weights, check_sizes, task_keys
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.functional.tree import Tree


@dataclass(frozen=True)
class Quadratics:
    """Random quadratics f(x) = ‖W x − y‖² with W `[d, d]` and y `[d]` standard normal, from x ~ N(0, 0.01²).

    Source: Andrychowicz et al., "Learning to learn by gradient descent by gradient descent", 2016, section 3.1.
    """

    dimensions: int = 10
    """d, the number of variables."""

    def __post_init__(self) -> None:
        check_sizes("Quadratics", self, ("dimensions",))

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of x."""
        return gym.spaces.Box(-np.inf, np.inf, (self.dimensions,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of an update of x."""
        return self.observation_space

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """Draw K = `count` quadratic functions with their starting points."""
        keys, d = task_keys(key, counter, count, split), self.dimensions
        draw = random.normal(keys, "quadratic", 0, (d, d + 2))
        return {"matrix": draw[..., :d], "target": draw[..., d], "start": 0.01 * draw[..., d + 1]}

    def start(self, problem: Tree) -> Weights:
        """Starting point `{"x": [*L, K, d]}`."""
        return {"x": problem["start"]}

    def loss(self, weights: Weights, problem: Tree, step: Tensor) -> Tensor:
        """Loss f(x), `[*L, K]`."""
        x = weights["x"]
        return ((problem["matrix"] @ x.unsqueeze(-1)).squeeze(-1) - problem["target"]).square().sum(-1)


@dataclass(frozen=True)
class DigitMLPs:
    """Training of one-hidden-layer MLPs on digits by cross-entropy, with random initial weights and minibatches.

    Training problems use one half of the images, validation and test problems a quarter each.

    Source: Andrychowicz et al., 2016, section 3.2, on the 8 x 8 digits of scikit-learn.
    """

    hidden: int = 20
    """Number of hidden units."""
    batch_size: int = 128
    """Number of images in a minibatch."""
    activation: Literal["sigmoid", "relu", "tanh"] = "sigmoid"
    """Activation function of the hidden layer."""

    def __post_init__(self) -> None:
        check_sizes("DigitMLPs", self, ("hidden", "batch_size"))
        if self.activation not in ("sigmoid", "relu", "tanh"):
            raise SettingError(f"DigitMLPs: activation is {self.activation!r}, expected sigmoid, relu or tanh")

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of one image."""
        return gym.spaces.Box(0.0, 1.0, (64,), np.float32)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the digit."""
        return gym.spaces.Discrete(10)

    @cached_property
    def _digits(self) -> tuple[Tensor, Tensor]:
        data = labelled("digits")
        images = torch.cat([data.train.observation, data.test.observation]).reshape(-1, 64).float() / 255
        return images, torch.cat([data.train.target, data.test.target])

    def tasks(self, key: Tensor, counter: int | Tensor, count: int, split: Split) -> Tree:
        """Draw K = `count` problems: a key each, and the part of the images they use."""
        keys = task_keys(key, counter, count, split)
        return {"key": keys, "part": torch.full_like(keys, get_args(Split).index(split))}

    def start(self, problem: Tree) -> Weights:
        """Initial weights with standard deviation 1 / √inputs, and zero biases."""
        key, h = problem["key"], self.hidden
        first = random.normal(key, "first layer", 0, (h, 64)) / 8.0
        second = random.normal(key, "second layer", 0, (10, h)) / math.sqrt(h)
        zeros = first.new_zeros
        return {
            "0.weight": first,
            "0.bias": zeros((*key.shape, h)),
            "1.weight": second,
            "1.bias": zeros((*key.shape, 10)),
        }

    def loss(self, weights: Weights, problem: Tree, step: Tensor) -> Tensor:
        """Cross-entropy of a minibatch in nats, `[*L, K]`."""
        images, digits = (part.to(step.device) for part in self._digits)
        quarter, part = len(images) // 4, problem["part"].unsqueeze(-1)
        index = random.integers(problem["key"], "minibatch", step, (self.batch_size,), 2 * quarter)
        index = torch.where(part == 0, index, (part + 1) * quarter + index % quarter)
        hidden = images[index] @ weights["0.weight"].mT + weights["0.bias"].unsqueeze(-2)
        hidden = getattr(torch, self.activation)(hidden)
        logits = hidden @ weights["1.weight"].mT + weights["1.bias"].unsqueeze(-2)
        log_prob = logits.log_softmax(-1).gather(-1, digits[index].unsqueeze(-1))
        return -log_prob.squeeze(-1).mean(-1)

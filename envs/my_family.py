"""Your own family of tasks to learn to learn. Copy this file and change it; `python envs/my_family.py` checks it.

rlmeta train maml my_family:MyFamily --env.slope 3

A family of a native environment's constants can be written without code, see navigation.toml.
"""

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch

from rlmeta.envs.task_families import task_keys
from rlmeta.functional.random import make_keys, normal, uniform


@dataclass(frozen=True)
class MyFamily:
    """Lines through a point: y = slope · a · x + b with a, b standard normal. The fields are the settings."""

    shots: int = 5
    queries: int = 10
    slope: float = 1.0

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)  # of one x
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)  # of one y; Discrete(n) for n classes

    def tasks(self, key, counter, count, split):
        """`count` tasks for every learner's key `[*L]`: samples to adapt to and to be asked about, `[*L, K, n, D]`.

        Chance comes from the keys alone, so that a counter repeats its tasks; `task_keys` gives every split its own.
        """
        keys = task_keys(key, counter, count, split)  # [*L, K]
        a, b = normal(keys, "line", 0, (2, 1, 1)).unbind(-3)  # each [*L, K, 1, 1]
        x = 2 * uniform(keys, "x", 0, (self.shots + self.queries, 1)) - 1
        y = self.slope * a * x + b
        cuts = {"support": slice(0, self.shots), "query": slice(self.shots, None)}
        return {part: {"observation": x[..., cut, :], "target": y[..., cut, :]} for part, cut in cuts.items()}


if __name__ == "__main__":
    family, two = MyFamily(), make_keys([4, 7])
    drawn, alone = family.tasks(two, 0, 3, "train"), family.tasks(two[1:], 0, 3, "train")
    for part, count in (("support", family.shots), ("query", family.queries)):
        for name, space in (("observation", family.observation_space), ("target", family.action_space)):
            value = drawn[part][name]
            assert value.shape == (2, 3, count, *space.shape), f"{part} {name} must be [*L, K, n, ...]"
            assert torch.isfinite(value).all(), f"{part} {name} must be finite"
            assert torch.equal(value[1:], alone[part][name]), "a learner's tasks must not depend on the others"
            assert not torch.equal(value, family.tasks(two, 1, 3, "train")[part][name]), "a counter is other tasks"
    held_out = family.tasks(two, 0, 3, "test")["support"]["observation"]
    assert not torch.equal(drawn["support"]["observation"], held_out), "splits must not share tasks"
    print("MyFamily is fine: rlmeta train maml my_family:MyFamily --env.slope 3")

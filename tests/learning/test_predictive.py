"""What learners say of what they know: distributions and features, for all learners at once as for each alone."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.learner import initial_tensors
from rlmeta.learning.predictive import check_predictive, predicting
from rlmeta.nn import Context

S = B = D = 3
BOX, DISCRETE = gym.spaces.Box(-1.0, 1.0, (D,), np.float32), gym.spaces.Discrete(3)
SMALL: dict[str, Any] = {"hidden_sizes": (4,)}
LEARNERS = {
    "classifier": (rl.Classifier(**SMALL), DISCRETE, "net"),
    "regressor": (rl.Regressor(**SMALL), BOX, "net"),
    "ppo": (rl.PPO(**SMALL), DISCRETE, "policy"),
    "ppo, shared": (rl.PPO(share_network=True, **SMALL), BOX, "policy"),
    "ppo, gSDE": (rl.PPO(state_dependent_exploration=True, **SMALL), BOX, "policy"),
    "sac": (rl.SAC(**SMALL), BOX, "policy"),
    "td3": (rl.TD3(**SMALL), BOX, "policy"),
    "sac, gSDE": (rl.SAC(state_dependent_exploration=True, **SMALL), BOX, "policy"),
    "sac, discrete": (rl.SAC(**SMALL), DISCRETE, "policy"),
    "trpo": (rl.TRPO(**SMALL), BOX, "policy"),
    "impala": (rl.IMPALA(**SMALL), BOX, "policy"),
    "ppg": (rl.PPG(**SMALL), DISCRETE, "policy"),
    "ddpg": (rl.DDPG(**SMALL), BOX, "policy"),
}


def bound(name: str) -> tuple[Any, Any, Any]:
    settings, target, _ = LEARNERS[name]
    learner = settings.bind(BOX, target)
    key = random.make_keys(range(S))
    p = {"weights": initial_tensors(learner.networks, key), "buffers": {}, "normalisers": {}, "hyper": {}}
    return learner, p, {"observation": random.normal(key, "x", 0, (B, D))}


@pytest.mark.parametrize("name", LEARNERS)
def test_all_learners_at_once_say_what_each_says_alone(name: str) -> None:
    learner, p, batch = bound(name)
    for ask in (learner.distribution, lambda *a: {"features": learner.features(*a)}):
        together = ask(p, batch, Context())
        for one in range(S):
            alone = ask(*tree.map(lambda x: x[one], {"p": p, "batch": batch}).values(), Context())  # noqa: B023
            for part, value in alone.items():
                torch.testing.assert_close(together[part][one].expand_as(value), value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_last_layer_of_the_features_is_the_distribution(name: str) -> None:
    learner, p, batch = bound(name)
    features, said = learner.features(p, batch, Context()), learner.distribution(p, batch, Context())
    last = ".1" if LEARNERS[name][2] == "net" else ".head"
    block = torch.nn.ModuleDict(learner.networks()).get_submodule(LEARNERS[name][2] + last)
    found = block.run(p["weights"], features, Context(), f"{LEARNERS[name][2]}{last}.")
    found = found if isinstance(found, dict) else {next(iter(said)): found}
    assert set(said) == set(found) - {"features", "noise_log_std"}, "what only serves to sample is left out"
    assert all(torch.equal(said[part], found[part]) for part in said)


@pytest.mark.parametrize("name", LEARNERS)
def test_the_weights_a_distribution_depends_on_are_those_with_a_gradient(name: str) -> None:
    learner, p, batch = bound(name)
    p["weights"] = {n: w.requires_grad_() for n, w in p["weights"].items()}
    total = torch.stack([value.sum() for value in learner.distribution(p, batch, Context()).values()]).sum()
    found = torch.autograd.grad(total, list(p["weights"].values()), allow_unused=True)
    moved = [n for n, g in zip(p["weights"], found) if g is not None]
    sampling = [n for n in p["weights"] if "noise_log_std" in n]
    assert sorted({*moved, *sampling}) == sorted(predicting(learner, p["weights"]))


@pytest.mark.parametrize("settings", [rl.DQN(), rl.MAML(rl.Classifier()), rl.LearnedOptimizer()])
def test_a_learner_without_a_distribution_is_refused(settings: Any) -> None:
    with pytest.raises(SettingError, match="gives no distribution over actions or targets"):
        check_predictive(settings.bind(BOX, DISCRETE))

"""SAC, TD3 and DDPG: their losses against plain torch, what their gradients reach, delays, targets, learning."""

from __future__ import annotations

import dataclasses
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlmeta.agents import DDPG, SAC, TD3
from rlmeta.envs.task import task
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import random, tree
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.state import take
from rlmeta.learning.step import step
from rlmeta.nn import Context
from tests.agents.worlds import Target, start, train

COMMON = {"num_envs": 4, "num_steps": 4, "gradient_steps": 4, "batch_size": 32, "capacity": 2_000,
          "learning_starts": 32, "hidden_sizes": (16,), "critic_learning_rate": 5e-3, "target_rate": 0.05}  # fmt: skip
SMALL = {
    "sac": SAC(**COMMON, actor_learning_rate=5e-3, temperature_learning_rate=1e-2, target_entropy=-2.0),
    "td3": TD3(**COMMON, actor_learning_rate=1e-3, exploration_noise=0.3),
    "ddpg": DDPG(**COMMON, actor_learning_rate=1e-3, exploration_noise=0.3),
}
NAMES = list(SMALL)


class Weights(gym.Env):
    """Two numbers in bounds that are far from [-1, 1]; the reward falls with the distance from 2 and -30."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(np.array([0.0, -40.0], np.float32), np.array([4.0, 0.0], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        distance = abs(action[0] - 2.0) / 4 + abs(action[1] + 30.0) / 40
        return np.ones(2, np.float32), 1.0 - distance, True, False, {}


class Choice(gym.Env):
    """Three actions, of which an observation may allow some."""

    action_space = gym.spaces.Discrete(3)

    def __init__(self, masked):
        where = gym.spaces.Box(-1, 1, (3,), np.float32)
        self.observation_space = where
        if masked:
            self.observation_space = gym.spaces.Dict({"where": where, "action_mask": gym.spaces.MultiBinary(3)})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        where = np.zeros(3, np.float32)
        if isinstance(self.observation_space, gym.spaces.Dict):
            return {"where": where, "action_mask": np.ones(3, np.int8)}, {}
        return where, {}


@pytest.mark.parametrize("name", NAMES)
def test_learns_an_action_in_bounds_of_any_size(name):
    problem = task(Weights, name="weights")
    agent, state = train(SMALL[name], problem, 80 if name == "sac" else 160)
    world = problem.world((2,), 1)
    assert (evaluate(agent, state["params"], world, state["key"], 4).returns.mean(-1) > 0.85).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_crosses_from_a_groups_loss_into_the_weights_of_another(name):
    agent, state, world = start(SMALL[name], "Pendulum-v1", 2)
    for _ in range(3):
        state, _ = agent.iterate(state, world)
    alone = {}
    for moving in agent.groups(state)[-1]:
        copied = tree.map(torch.clone, state)
        batch = {
            "observation": torch.randn(2, 8, 3),
            "next_observation": torch.randn(2, 8, 3),
            "action": torch.rand(2, 8, 1),
            "reward": torch.randn(2, 8),
            "discount": torch.full((2, 8), 0.9),
            "valid": torch.ones(2, 8, dtype=torch.bool),
        }
        after, _ = step(agent, copied, batch, [moving], key=state["key"])
        moved = {
            weight
            for weight, value in after["params"]["weights"].items()
            if not torch.equal(value, state["params"]["weights"][weight])
        }
        alone[moving.name] = moved
        assert moved and all(weight.startswith(moving.weights) for weight in moved)
    assert set().union(*alone.values()) == set(state["params"]["weights"])


def test_td3s_policy_and_targets_move_in_every_other_step():
    settings = dataclasses.replace(SMALL["td3"], gradient_steps=2, learning_starts=16)
    agent, state, world = start(settings, "Pendulum-v1", 2)
    agent.capture = None
    seen = []
    inner = agent.losses

    def losses(p, batch, ctx):
        seen.append((ctx.moves("actor"), p["weights"]["policy.head.linear.weight"].detach().clone(),
                     p["buffers"]["target_q.member.head.linear.weight"].clone()))  # fmt: skip
        return inner(p, batch, ctx)

    agent.losses = losses
    for _ in range(3):
        state, _ = agent.iterate(state, world)
    moves, policies, targets = zip(*seen)
    assert moves == (False, True) * 3
    for i in range(0, 6, 2):
        assert torch.equal(policies[i], policies[i + 1]) and torch.equal(targets[i], targets[i + 1])
    assert not torch.equal(policies[1], policies[2]) and not torch.equal(targets[1], targets[2])
    assert state["optimizer"]["critic"]["count"].tolist() == [6, 6]
    assert state["optimizer"]["actor"]["count"].tolist() == [3, 3]


@pytest.mark.parametrize("name", NAMES)
def test_recorded_iterations_equal_unrecorded_ones(name):
    ends = []
    for recorded in (True, False):
        agent, state, world = start(SMALL[name], "Pendulum-v1", 3)
        agent.capture = agent.capture if recorded else None
        for _ in range(40):
            state, _ = agent.iterate(state, world)
        assert bool(state["active"].all()) and int(state["count"]["gradient_steps"].max()) > 100
        ends.append(state)
    for part in ("params", "optimizer", "replay", "world"):
        ours, theirs = (tree.flatten(state[part]) for state in ends)
        assert ours.keys() == theirs.keys()
        for leaf, value in ours.items():
            torch.testing.assert_close(value, theirs[leaf], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_learners_numbers_do_not_depend_on_its_company(name):
    _, state = train(SMALL[name], "Pendulum-v1", 6, seeds=3)
    _, alone = train(SMALL[name], "Pendulum-v1", 6, seeds=1)
    for leaf, value in tree.flatten(take(state, slice(0, 1))["params"]["weights"]).items():
        torch.testing.assert_close(value, alone["params"]["weights"][leaf], rtol=1e-4, atol=1e-5)


def test_sacs_losses_are_those_of_the_paper():
    agent, state, _ = start(dataclasses.replace(SMALL["sac"], target_entropy=-1.0), "Pendulum-v1", 1)
    g = torch.Generator().manual_seed(0)
    batch = {
        "observation": torch.randn(1, 6, 3, generator=g),
        "next_observation": torch.randn(1, 6, 3, generator=g),
        "action": torch.rand(1, 6, 1, generator=g) * 4 - 2,
        "reward": torch.randn(1, 6, generator=g),
        "discount": torch.tensor([[0.9, 0.0, 0.9, 0.9, 0.9, 0.9]]),
        "valid": torch.ones(1, 6, dtype=torch.bool),
    }
    p, key = state["params"], state["key"]
    p["weights"]["temperature.log"] = torch.tensor([-0.7])
    found = agent.losses(p, batch, StepContext(training=True, key=key))
    alpha = torch.tensor(-0.7).exp()

    def sample(observation, name):
        d = agent.forward(agent.policy, "policy", p, observation)
        return agent.head.sample_log_prob(d, random.fold(key, name))

    def q(name, observation, action):
        return agent.values(p, name, observation, action, Context())[0]

    next_action, next_log_prob = sample(batch["next_observation"], "next action")
    target = batch["reward"] + batch["discount"] * (
        q("target", batch["next_observation"], next_action).min(0).values - alpha * next_log_prob
    )
    critic = sum((q("q", batch["observation"], batch["action"])[i] - target).square().mean() for i in range(2))
    action, log_prob = sample(batch["observation"], "action")
    actor = (alpha * log_prob - q("q", batch["observation"], action).min(0).values).mean()
    in_units = log_prob + float(np.log(2.0))  # density of the action in units of [-1, 1]
    temperature = -(torch.tensor(-0.7) * (in_units.detach() - 1.0)).mean()
    torch.testing.assert_close(found["critic"], critic.reshape(1))
    torch.testing.assert_close(found["actor"], actor.reshape(1))
    torch.testing.assert_close(found["temperature"], temperature.reshape(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_discrete_sacs_losses_are_sums_over_the_actions(masked):
    """With a mask, actions that are not allowed have no part: none in sums, none in the largest entropy."""
    settings = dataclasses.replace(SMALL["sac"], critics=2, entropy_fraction=0.6)
    agent, state, _ = start(settings, task(partial(Choice, masked), name="choice"), 2)
    g = torch.Generator().manual_seed(0)

    def observation(rows):
        x = torch.randn(2, rows, 3, generator=g)
        mask = torch.ones(2, rows, 3, dtype=torch.int8)
        mask[:, ::2, 1], mask[:, 1, :2] = 0, 0
        return {"where": x, "action_mask": mask} if masked else x

    batch = {
        "observation": observation(6),
        "next_observation": observation(6),
        "action": torch.full((2, 6), 2),
        "reward": torch.randn(2, 6, generator=g),
        "discount": torch.tensor([[0.9, 0.0, 0.9, 0.9, 0.9, 0.9]] * 2),
        "valid": torch.arange(6).expand(2, 6) < 5,
    }
    p, key = state["params"], state["key"]
    p["weights"]["temperature.log"] = torch.tensor([0.7, -0.7])  # above 1 in one: infinities must not be made
    p["buffers"] = {name: 0.7 * value for name, value in p["buffers"].items()}
    leaves = {name: w.detach().clone().requires_grad_() for name, w in p["weights"].items()}
    p = {**p, "weights": leaves}
    found = agent.losses(p, batch, StepContext(training=True, key=key))
    for loss in found.values():
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    for learner in range(2):
        alpha = leaves["temperature.log"][learner].exp()

        def soft(critics, observation, row, learner=learner, alpha=alpha):
            logits = agent.forward(agent.policy, "policy", p, observation)["logits"][learner, row]
            q = agent.values(p, critics, observation, None, Context())[learner, :, row].min(0).values
            own = [a for a in range(3) if not masked or observation["action_mask"][learner, row, a]]
            log_pi = logits[own].log_softmax(0)
            return (log_pi.exp() * (q[own] - alpha * log_pi)).sum(), -(log_pi.exp() * log_pi).sum(), len(own)

        critic = actor = excess = 0.0
        for row in range(5):
            after, _, _ = soft("target", batch["next_observation"], row)
            y = batch["reward"][learner, row] + batch["discount"][learner, row] * after
            q = agent.values(p, "q", batch["observation"], None, Context())[learner, :, row, 2]
            value, entropy, count = soft("q", batch["observation"], row)
            critic, actor = critic + (q - y).square().sum() / 5, actor - value / 5
            excess = excess + (entropy - 0.6 * float(np.log(count))) / 5
        torch.testing.assert_close(found["critic"][learner], critic, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["actor"][learner], actor, rtol=1e-4, atol=1e-5)
        expected = leaves["temperature.log"][learner] * excess
        torch.testing.assert_close(found["temperature"][learner], expected, rtol=1e-4, atol=1e-5)


def test_random_actions_of_the_warm_up_are_uniform_among_the_allowed():
    settings = dataclasses.replace(SMALL["sac"], capacity=4_000, num_envs=300)
    agent, state, _ = start(settings, task(partial(Choice, True), name="choice"), 1)
    p, key = state["params"], state["key"]
    p["weights"]["policy.head.linear.bias"] = torch.tensor([[9.0, 0.0, 0.0]])  # certain of the first
    x = {"where": torch.zeros(1, 300, 3), "action_mask": torch.tensor([1, 0, 1], dtype=torch.int8).expand(1, 300, 3)}
    drawn, _ = agent.act(p, x, {}, key)
    assert 100 < int((drawn == 2).sum()) < 200 and not bool((drawn == 1).any())
    p["hyper"]["warms_up"] = torch.tensor([False])
    assert int((agent.act(p, x, {}, key)[0] == 0).sum()) > 290


def test_noise_of_sac_is_held_while_acting():
    settings = dataclasses.replace(SMALL["sac"], state_dependent_exploration=True, noise_hold=3, initial_log_std=-1.0)
    agent, _, _ = start(settings, "Pendulum-v1", 1)
    assert agent.noise_hold == 3 and start(SMALL["sac"], "Pendulum-v1", 1)[0].noise_hold == 1
    with pytest.raises(SettingError, match="state_dependent_exploration is for a Box"):
        start(settings, "CartPole-v1", 1)


def test_ddpgs_losses_are_those_of_the_paper():
    agent, state, _ = start(SMALL["ddpg"], "Pendulum-v1", 2)
    g = torch.Generator().manual_seed(0)
    batch = {
        "observation": torch.randn(2, 6, 3, generator=g),
        "next_observation": torch.randn(2, 6, 3, generator=g),
        "action": torch.rand(2, 6, 1, generator=g) * 4 - 2,
        "reward": torch.randn(2, 6, generator=g),
        "discount": torch.tensor([[0.9, 0.0, 0.9, 0.9, 0.9, 0.9]] * 2),
        "valid": torch.arange(6).expand(2, 6) < 5,
    }
    p = state["params"]
    p["buffers"] = {name: 0.7 * value for name, value in p["buffers"].items()}  # targets unlike what they follow
    found = agent.losses(p, batch, StepContext(training=True, key=state["key"]))
    tensors = {**p["weights"], **p["buffers"]}

    def layers(x, prefix, names, learner):
        for name in names:
            x = torch.nn.functional.linear(x, *(tensors[f"{prefix}.{name}.{w}"][learner] for w in ("weight", "bias")))
            x = x if name.startswith("head") else x.relu()
        return x

    def policy(prefix, observation, learner):
        return 2 * layers(observation, prefix, ("body.1.0", "head.linear"), learner).tanh()

    def q(prefix, observation, action, learner):
        return layers(torch.cat([observation, action / 2], -1), prefix, ("joint.0", "head.linear"), learner)[:, 0]

    for learner in range(2):
        mine = {name: value[learner][:5] for name, value in batch.items()}
        after = policy("target_policy", mine["next_observation"], learner)
        y = mine["reward"] + mine["discount"] * q("target_q", mine["next_observation"], after, learner)
        critic = (q("q", mine["observation"], mine["action"], learner) - y).square().mean()
        actor = -q("q", mine["observation"], policy("policy", mine["observation"], learner), learner).mean()
        torch.testing.assert_close(found["critic"][learner], critic)
        torch.testing.assert_close(found["actor"][learner], actor)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", ["discrete", "unbounded", "multibinary"])
def test_actions_without_finite_bounds_are_refused(name, space):
    class Unbounded(Target):
        action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    problem = task(Weights, name="weights")
    if space == "discrete" and name == "sac":
        start(SMALL[name], task(partial(Target, space), name="target"))
    elif space != "unbounded":
        problem = task(partial(Target, space), name="target")
        with pytest.raises(SpaceError, match="finite bounds"):
            start(SMALL[name], problem)
    else:
        with pytest.raises(SpaceError, match="finite bounds"):
            SMALL[name].bind(problem.world((1,), 1).observation_space, Unbounded.action_space)


def test_settings_that_leave_nothing_to_learn_are_refused():
    with pytest.raises(SettingError, match="capacity"):
        SAC(capacity=16, num_envs=4, num_steps=4)
    with pytest.raises(SettingError, match="policy_delay"):
        TD3(gradient_steps=3, policy_delay=2)
    with pytest.raises(SettingError, match="hidden_sizes"):
        SAC(hidden_sizes=())

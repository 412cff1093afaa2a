"""What every agent must do: learn, on every space, through time limits, and without looking at its company."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import rlmeta as rl
from rlmeta.agents import A2C, DQN, IMPALA, PPG, PPO, REINFORCE, SAC, TRPO
from rlmeta.envs.task import task
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import random, tree
from rlmeta.learning.collect import collect
from rlmeta.learning.evaluate import evaluate
from rlmeta.learning.state import take
from tests.agents.worlds import Endless, Target, start, train

SMALL = {
    "ppo": PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=4, learning_rate=3e-3, hidden_sizes=(16,)),
    "a2c": A2C(num_envs=8, num_steps=5, learning_rate=1e-2, hidden_sizes=(16,)),
    "dqn": DQN(num_envs=4, num_steps=8, gradient_steps=8, batch_size=32, capacity=2000, learning_starts=64,
               learning_rate=5e-3, target_every=16, hidden_sizes=(16,), exploration_fraction=0.5),
    "reinforce": REINFORCE(num_envs=8, num_steps=8, learning_rate=1e-2, hidden_sizes=(16,)),
    "impala": IMPALA(num_envs=8, num_steps=8, num_epochs=2, sequences=4, learning_rate=1e-2, hidden_sizes=(16,)),
    "trpo": TRPO(num_envs=4, num_steps=16, batch_size=32, kl_target=0.1, value_learning_rate=1e-2, value_epochs=4,
                 conjugate_steps=5, line_search_steps=5, hidden_sizes=(16,)),
    "ppg": PPG(num_envs=4, num_steps=16, batch_size=32, policy_epochs=4, value_epochs=4, auxiliary_every=4,
               learning_rate=3e-3, hidden_sizes=(16,)),
    "sac": SAC(num_envs=4, num_steps=8, gradient_steps=8, batch_size=32, capacity=2000, learning_starts=64,
               actor_learning_rate=5e-3, critic_learning_rate=5e-3, temperature_learning_rate=1e-2,
               entropy_fraction=0.3, target_rate=0.05, hidden_sizes=(16,)),
}  # fmt: skip


def greedy_return(agent, state, problem, episodes=16):
    world = problem.world(tuple(state["key"].shape), 1)
    try:
        key = random.fold(state["key"], "test")
        return evaluate(agent, agent.effective_params(state), world, key, episodes).returns.mean(-1)
    finally:
        world.close()


def weights_of(state, learner):
    return list(tree.leaves(take(state, learner)["params"]["weights"]))


@pytest.mark.parametrize("kind", ["discrete", "shifted", "multidiscrete", "multibinary", "box"])
@pytest.mark.parametrize("name", list(SMALL))
def test_learns_to_name_its_observation_in_every_action_space(name, kind):
    problem = task(partial(Target, kind), name="target")
    spaces = {"dqn": ("discrete", "shifted"), "sac": ("discrete", "shifted", "box")}
    if kind not in spaces.get(name, kind):
        with pytest.raises(SpaceError, match=r"DQN chooses among Discrete|SAC acts in a Box"):
            start(SMALL[name], problem)
        return
    agent, state = train(SMALL[name], problem, 30)
    assert (greedy_return(agent, state, problem) > (0.6 if kind == "box" else 0.9)).all()


@pytest.mark.parametrize("name", list(SMALL))
def test_masked_actions_are_never_taken(name):
    problem = task(partial(Target, "discrete", masked=True), name="masked")
    agent, state = train(SMALL[name], problem, 6)  # the environment asserts
    assert greedy_return(agent, state, problem).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce", "dqn"])  # tests/test_crossings.py has all
def test_dictionary_observations_and_a_network_of_ones_own(name):
    import dataclasses

    class Net(nn.Module):
        def __init__(self, space):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 16), nn.LayerNorm(16), nn.Tanh())

        def forward(self, observation):
            return self.layers(observation["goal"])

    problem = task(partial(Target, "discrete", as_dict=True), name="dict")
    for settings in (SMALL[name], dataclasses.replace(SMALL[name], network=Net)):
        agent, state = train(settings, problem, 25)
        assert (greedy_return(agent, state, problem) > 0.9).all()


def test_a_network_that_gives_no_features_is_refused_before_training():
    with pytest.raises(SettingError, match=r"features \[B, D\]"):
        start(PPO(network=lambda space: nn.Flatten(0)), "CartPole-v1")
    with pytest.raises(SettingError, match="expected a function from an observation space"):
        start(PPO(network=lambda space: 3), "CartPole-v1")


@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce", "dqn", "impala"])
def test_time_limits_bootstrap_so_that_an_endless_reward_is_worth_its_sum(name):
    import dataclasses

    settings = dataclasses.replace(SMALL[name], gamma=0.8)
    agent, state = train(settings, task(partial(Endless, 7), name="endless"), 120)
    observation = torch.ones(2, 1, 2)
    network, group = (agent.q, "q") if name == "dqn" else (agent.value, "value")
    value = agent.forward(network, group, state["params"], observation)
    assert (value.reshape(2, -1).max(-1).values - 5.0).abs().max() < 0.5


@pytest.mark.parametrize("name", list(SMALL))
def test_a_learner_is_the_same_in_any_company_up_to_rounding(name):
    import dataclasses

    settings = SMALL[name]
    together = train(settings, "CartPole-v1", 3, seeds=3)[1]
    alone = train(settings, "CartPole-v1", 3, seeds=1)[1]
    field = {"trpo": "kl_target", "sac": "actor_learning_rate"}.get(name, "learning_rate")
    many = dataclasses.replace(settings, **{field: [getattr(settings, field), 0.5]})
    compared = train(many, "CartPole-v1", 3, seeds=1)[1]
    for other in (alone, compared):
        for a, b in zip(weights_of(together, 0), weights_of(other, 0)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(weights_of(compared, 0)[-1], weights_of(compared, 1)[-1])


@pytest.mark.parametrize("name", list(SMALL))
def test_same_seeds_give_the_same_bits_and_other_seeds_do_not(name):
    one, two = (train(SMALL[name], "CartPole-v1", 3)[1] for _ in range(2))
    for a, b in zip(tree.leaves(one), tree.leaves(two)):
        assert torch.equal(a, b)
    *_, weights = tree.leaves(one["params"]["weights"])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("name", list(SMALL))
def test_a_learner_turned_nan_stops_and_the_others_go_on_bit_for_bit(name):
    agent, state, world = start(SMALL[name], "CartPole-v1", 3)
    agent, broken, broken_world = start(SMALL[name], "CartPole-v1", 3)
    first = next(iter(broken["params"]["weights"].values()))
    first[1].fill_(torch.nan)
    for i in range(6):
        for one, where in ((state, world), (broken, broken_world)):
            one["progress"] = torch.full_like(one["progress"], i / 6)
            agent.iterate(one, where)
    assert broken["active"].tolist() == [True, False, True]
    for kept in (0, 2):
        for a, b in zip(weights_of(state, kept), weights_of(broken, kept)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["ppo", "a2c", "reinforce", "trpo", "ppg"])
def test_a_relabelled_reward_changes_the_credit(name):
    """Imitation's and reward shaping's stand-in: rewards are named streams that `credit` adds up."""
    agent, state, world = start(SMALL[name], "CartPole-v1")
    state, rollout = collect(agent, state, world, agent.steps_per_iteration)
    p, reward = state["params"], rollout["reward"]
    twice = agent.credit(p, rollout, {"task": reward, "curiosity": reward})
    double = agent.credit(p, rollout, {"task": 2 * reward})
    plain = agent.credit(p, rollout, {"task": reward})
    torch.testing.assert_close(twice["return"], double["return"])
    assert not torch.allclose(twice["return"], plain["return"])


@pytest.mark.parametrize("name", list(SMALL))
def test_log_prob_is_that_of_the_distribution_and_differentiable(name):
    """Fisher information's and distillation's stand-in."""
    agent, state, world = start(SMALL[name], "CartPole-v1")
    state, rollout = collect(agent, state, world, 4)
    weights = {n: w.detach().clone().requires_grad_() for n, w in state["params"]["weights"].items()}
    p = {**state["params"], "weights": weights}
    rows = rollout["action"].flatten(1, 2)
    total = torch.zeros(rows.shape)
    for action in (0, 1):
        batch = {"observation": rollout["observation"].flatten(1, 2), "action": torch.full_like(rows, action)}
        total = total + agent.log_prob(p, batch).exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    gradients = torch.autograd.grad(agent.log_prob(p, batch).sum(), list(weights.values()), allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)


def test_samples_for_lifelong_methods_are_of_all_environments_and_every_eighth_step() -> None:
    """Neighbours in time are nearly the same: a draw that stays in one environment knows a single episode."""
    run = rl.train(PPO(num_envs=4, num_steps=8, batch_size=32), "CartPole-v1", seeds=2, steps=64, final_episodes=2)
    state, world = run.state, run.world
    samples = run.agent.draw(state, world, 10)
    copied = {**tree.map(torch.clone, state), "key": random.fold(state["key"], "draw")}
    _, rollout = collect(run.agent, copied, world, 24)
    expected = torch.cat([rollout["observation"][:, step] for step in (0, 8, 16)], 1)[:, :10]
    assert torch.equal(samples["observation"], expected)
    assert torch.equal(samples["observation"][:, :4], world.observation(state["world"]))

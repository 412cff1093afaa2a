"""GAIL: the discriminator by hand, its reward, horizons that vary, cloning before it, and what it learns."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import rlmeta as rl
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.native import TabularMDP
from rlmeta.errors import DemonstrationError, SettingError
from rlmeta.functional import random, tree
from rlmeta.imitation.gail import Discriminator
from rlmeta.learning.collect import collect
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import initial_tensors
from tests.agents.worlds import start

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)


def demonstrations(
    lengths: tuple[int, ...] = (30, 20), action_space: gym.Space | None = None, terminated: bool = False, **changed: Any
) -> Demonstrations:
    """Random observations of an agent that does action 1 where the first entry is positive."""
    generator = torch.Generator().manual_seed(0)
    steps, episodes, rows = sum(lengths), len(lengths), sum(lengths) + len(lengths)
    observation = torch.randn(rows, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.0]) + 2
    before = torch.arange(steps) + torch.repeat_interleave(torch.arange(episodes), torch.tensor(lengths))
    action = (observation[before, 0] > 2).long()
    if isinstance(action_space, gym.spaces.Box):
        action = action.float().unsqueeze(-1)
    given = {
        "observation": observation,
        "action": action,
        "reward": torch.zeros(steps),
        "lengths": torch.tensor(lengths),
        "terminated": torch.full((episodes,), terminated),
        "truncated": torch.full((episodes,), not terminated),
        "observation_space": BOX,
        "action_space": action_space or gym.spaces.Discrete(2),
    }
    return Demonstrations(**{**given, **changed})


def parameters(discriminator: Discriminator, learners: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    weights = initial_tensors(discriminator.networks, random.make_keys(range(learners)))
    return {"weights": {name: weight.to(dtype) for name, weight in weights.items()}, "buffers": {}}


def batch_of(discriminator: Discriminator, learners: int, size: int) -> dict[str, Any]:
    key = random.make_keys(range(learners))
    draw = lambda name, *shape: random.normal(key, name, 0, (size, *shape), torch.float64)  # noqa: E731

    def side(name: str) -> dict[str, Tensor]:
        inputs = draw(name, discriminator.features)
        if discriminator.absorbing:
            inputs[..., -1] = 0
        return {"input": inputs, "ends": (draw(f"{name} ends") > 1).double()}

    return {
        "demonstrations": side("real"),
        "agent": {**side("fake"), "valid": (draw("valid") > -1).double()},
        "mix": random.uniform(key, "mix", 0, (size, 1), torch.float64),
        "gradient_penalty": torch.linspace(0.5, 2.0, learners, dtype=torch.float64),
    }


# ------------------------------------------------------------------------------------------------ the discriminator


def test_inputs_are_whitened_by_the_demonstrations_and_actions_are_within_their_bounds():
    space = gym.spaces.Box(-1, 1, (1,), np.float32)
    made = demonstrations(action_space=space)
    discriminator = Discriminator(made, (4,), False)
    shown = discriminator.shown["input"]
    torch.testing.assert_close(shown[:, :2].mean(0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(shown[:, :2].var(0, correction=0), torch.ones(2), rtol=0, atol=1e-3)
    assert not shown[:, 2].any()  # it never varies: what does is far, but not infinitely
    strange = discriminator.encode(torch.tensor([[2.0, 2.0, 2.05]]), torch.tensor([[0.0]]))
    assert 4.9 < float(strange[0, 2]) < 5.1
    wild, most = (discriminator.encode(made.observation[:1], torch.tensor([[a]])) for a in (7.0, 1.0))
    assert torch.equal(wild, most)


@pytest.mark.parametrize("absorbing", [False, True])
def test_the_loss_is_binary_cross_entropy_by_hand(absorbing):
    """Two learners, a weight for every visit of the absorbing state, a loop over samples for the penalty."""
    discriminator = Discriminator(demonstrations(), (6,), absorbing)
    p, batch = parameters(discriminator, 2), batch_of(discriminator, 2, 7)
    ctx = StepContext()
    found = discriminator.losses(p, batch, ctx)
    for i in range(2):
        one = {"weights": {n: w[i] for n, w in p["weights"].items()}, "buffers": {}}
        real, fake, valid = batch["demonstrations"], batch["agent"], batch["agent"]["valid"][i]
        sides = []
        for side, label, weight in ((real, 1.0, torch.ones(7).double()), (fake, 0.0, valid)):
            logits, weights = discriminator.logit(one, side["input"][i]), weight
            if absorbing:
                last = torch.zeros(7, discriminator.features, dtype=torch.float64)
                last[:, -1] = 1
                logits = torch.cat((logits, discriminator.logit(one, last)))
                weights = torch.cat((weight, weight * side["ends"][i]))
            entropy = binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="none")
            sides.append((weights * entropy).sum() / weights.sum())
        torch.testing.assert_close(found["loss"][i], sides[0] + sides[1])
        total = 0.0
        for b in range(7):
            point = fake["input"][i, b] + batch["mix"][i, b] * (real["input"][i, b] - fake["input"][i, b])
            slope = torch.func.grad(lambda x, one=one: discriminator.logit(one, x))(point)
            total += (slope.norm() - 1) ** 2 / 7
        torch.testing.assert_close(found["gradient_penalty"][i], batch["gradient_penalty"][i] * total)
        logit = discriminator.logit(one, real["input"][i])
        assert ctx.info["accuracy_demonstrations"][i] == (logit > 0).double().mean()
        probability = torch.cat((logit, discriminator.logit(one, fake["input"][i]))).sigmoid()
        entropy = torch.distributions.Bernoulli(probability).entropy().mean()
        torch.testing.assert_close(ctx.info["entropy"][i], entropy)


def test_batched_equals_looped_also_where_learners_are_as_many_as_samples():
    discriminator = Discriminator(demonstrations(), (4,), True)
    for learners in (3, 5):
        p, batch = parameters(discriminator, learners), batch_of(discriminator, learners, 3)
        whole = discriminator.losses(p, batch, StepContext())
        for i in range(learners):
            one = discriminator.losses(
                tree.map(lambda leaf, i=i: leaf[i], p), tree.map(lambda leaf, i=i: leaf[i], batch), StepContext()
            )
            for name in whole:
                torch.testing.assert_close(whole[name][i], one[name])


# ------------------------------------------------------------------------------------------------------ the reward


@pytest.mark.parametrize(
    ("form", "of"),
    [("softplus", softplus), ("logit", lambda x: x), ("log_sigmoid", torch.nn.functional.logsigmoid)],
)
@pytest.mark.parametrize("absorbing", [False, True])
def test_what_follows_an_end_is_paid_for_ever_with_its_last_step(form, of, absorbing):
    reward = rl.AdversarialReward(demonstrations(terminated=True), form, absorbing=absorbing)
    p, gamma = parameters(reward.discriminator, 2), torch.tensor([0.9, 0.5], dtype=torch.float64)
    steps = {
        "input": batch_of(reward.discriminator, 2, 6)["agent"]["input"].reshape(2, 3, 2, -1),
        "ends": torch.zeros(2, 3, 2, dtype=torch.float64),
        "valid": torch.ones(2, 3, 2, dtype=torch.float64),
    }
    steps["ends"][0, 1, 1] = steps["ends"][1, 2, 0] = 1
    steps["valid"][1, 0, 0] = 0
    found = reward.judge(p, steps, gamma)
    expected = of(reward.discriminator.logit(p, steps["input"]))
    if absorbing:
        after = of(reward.discriminator.absorbing_logit(p))
        expected[0, 1, 1] += sum(0.9**k for k in range(1, 500)) * after[0]
        expected[1, 2, 0] += 1.0 * after[1]  # 0.5 + 0.25 + ...
    expected[1, 0, 0] = 0
    torch.testing.assert_close(found, expected)


P = torch.zeros(2, 2, 2, dtype=torch.float64)
P[0, 0, 0] = P[0, 1, 1] = P[1, :, 1] = 1
CORRIDOR = TabularMDP(P=P, R=torch.zeros(2, 2), terminal=torch.tensor([False, True]), max_episode_steps=20)
"""Action 1 ends the episode, action 0 goes on, to a limit of 20 steps."""


def corridor(lengths: tuple[int, ...]) -> Demonstrations:
    """Episodes that are ended by action 1 at their last step, or go on to the limit."""
    ends, last = torch.tensor([length < 20 for length in lengths]), torch.tensor(lengths).cumsum(0)
    action = torch.zeros(sum(lengths), dtype=torch.int64)
    action[last - 1] = ends.long()
    observation = torch.zeros(sum(lengths) + len(lengths), dtype=torch.int64)
    observation[last + torch.arange(len(lengths))] = ends.long()
    return Demonstrations(
        observation=observation,
        action=action,
        reward=torch.zeros(sum(lengths)),
        lengths=torch.tensor(lengths),
        terminated=ends,
        truncated=~ends,
        observation_space=CORRIDOR.observation_space,
        action_space=CORRIDOR.action_space,
    )


def length_learned(form: str, absorbing: bool, lengths: tuple[int, ...]) -> float:
    settings = rl.GAIL(
        demonstrations=corridor(lengths), form=form, absorbing=absorbing, num_envs=16, num_steps=20, batch_size=160,
        num_epochs=5, learning_rate=1e-2, gamma=0.95, gae_lambda=1.0, hidden_sizes=(8,), discriminator_updates=10,
        discriminator_batch_size=64, discriminator_learning_rate=1e-2, discriminator_hidden_sizes=(8,),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        budget = rl.Budget(steps=8_000, eval_every=10**6, final_episodes=64)
        run = rl.train(settings, rl.task(CORRIDOR, name="corridor"), seeds=2, budget=budget, threads=1)
    return float(run.evaluate(256, deterministic=False).lengths.double().mean())


def test_a_positive_reward_pays_for_surviving_unless_the_absorbing_state_is_seen():
    """The demonstrator ends at every step with probability 1/2, after 2 steps on average."""
    demonstrated = (1,) * 16 + (2,) * 8 + (3,) * 4 + (4,) * 2 + (5,)
    assert length_learned("softplus", False, demonstrated) > 4
    assert length_learned("softplus", True, demonstrated) < 3


def test_a_negative_reward_pays_for_ending_unless_the_absorbing_state_is_seen():
    """The demonstrator never ends. A reward that is always negative ends episodes all the same."""
    demonstrated = (20,) * 5
    assert length_learned("log_sigmoid", False, demonstrated) < 10
    assert length_learned("log_sigmoid", True, demonstrated) > 15


# ------------------------------------------------------------------------------------------------------ the learner

TINY: dict[str, Any] = {
    "num_envs": 2, "num_steps": 32, "batch_size": 32, "num_epochs": 1, "hidden_sizes": (8,),
    "discriminator_updates": 3, "discriminator_batch_size": 8, "discriminator_hidden_sizes": (8,),
}  # fmt: skip


def cartpole(**changed: Any) -> Demonstrations:
    space = rl.task("CartPole-v1").world((), 1).observation_space
    made = demonstrations(observation_space=BOX)
    observation = torch.cat((made.observation, made.observation[:, :1]), -1) * 0.5
    return replace(made, observation=observation, observation_space=space, **changed)


def test_the_tasks_reward_is_never_learned_from_and_the_learned_one_is_reported():
    task = rl.task("CartPole-v1")
    deaf = rl.task(replace(task.source, sutton_barto_reward=True), name="CartPole-v1")
    states = []
    for problem in (task, deaf):
        agent, state, world = start(rl.GAIL(demonstrations=cartpole(), **TINY), problem)
        for _ in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state, metrics = agent.iterate(state, world)
        states.append(state)
    for one, two in zip(*(tree.leaves(state["params"]["weights"]) for state in states)):
        assert torch.equal(one, two)
    expected = {"loss", "gradient_penalty", "accuracy_demonstrations", "accuracy_agent", "entropy", "grad_norm"}
    assert {name.split("/")[1] for name in metrics if name.startswith("discriminator/")} == expected
    assert (metrics["rewards/imitation"] > 0).all() and (metrics["rewards/task"] < 0).all()


def test_learners_do_not_see_each_other_and_rates_are_their_own():
    weights = []
    for rates in ([1e-3, 1e-2], [1e-3, 1e-4]):
        settings = rl.GAIL(demonstrations=cartpole(), discriminator_learning_rate=rates, **TINY)
        agent, state, world = start(settings, "CartPole-fixed", seeds=1)
        for _ in range(2):
            state, _ = agent.iterate(state, world)
        weights.append(tree.flatten(state["rewards"]["imitation"]["params"]["weights"]))
    for name in weights[0]:
        assert torch.equal(weights[0][name][0], weights[1][name][0])
        assert not torch.equal(weights[0][name][1], weights[1][name][1])


def test_a_learner_whose_discriminator_is_lost_is_frozen():
    agent, state, world = start(rl.GAIL(demonstrations=cartpole(), **TINY), "CartPole-fixed")
    next(iter(state["rewards"]["imitation"]["params"]["weights"].values()))[0] = torch.nan
    state, _ = agent.iterate(state, world)
    assert state["active"].tolist() == [False, True]
    assert all(torch.isfinite(leaf[1]).all() for leaf in tree.leaves(state["params"]["weights"]))


def test_a_discriminator_that_is_lost_freezes_its_learner_although_its_weights_are_finite():
    """Its gradient is not, so it stays where it was and judges on: the policy must not learn from it."""
    agent, state, world = start(rl.GAIL(demonstrations=cartpole(), **TINY), "CartPole-fixed")
    state["params"]["hyper"]["gradient_penalty"][0] = torch.inf
    before = tree.map(torch.clone, state["params"]["weights"])
    state, metrics = agent.iterate(state, world)
    assert metrics["rewards/imitation"].isfinite().all()
    assert state["active"].tolist() == [False, True]
    for name, weight in state["params"]["weights"].items():
        assert torch.equal(weight[0], before[name][0]) and not torch.equal(weight[1], before[name][1]), name


def test_any_agent_learns_from_the_adversarial_reward():
    reward = rl.AdversarialReward(cartpole(), updates=2, batch_size=8)
    for settings in (
        rl.A2C(num_envs=2, num_steps=8, rewards=(reward,)),
        rl.DQN(num_envs=2, num_steps=8, capacity=100, learning_starts=8, batch_size=4, rewards=(reward,)),
    ):
        agent, state, world = start(settings, "CartPole-fixed")
        for _ in range(2):
            state, metrics = agent.iterate(state, world)
        assert (metrics["rewards/imitation"] > 0).all()
        assert (state["rewards"]["imitation"]["count"]["gradient_steps"] == 4).all()


def test_a_warm_start_clones_before_the_first_rollout_and_only_then():
    agent, state, world = start(rl.GAIL(demonstrations=cartpole(), warm_start=200, **TINY), "CartPole-fixed")
    steps = agent.rewards[0].demonstrations.transitions()
    batch = {name: steps[name].expand(2, *steps[name].shape) for name in ("observation", "action")}
    before, moments = agent.log_prob(state["params"], batch).mean(-1), state["optimizer"]
    cloned = agent.pretrain(state)
    assert (agent.log_prob(cloned["params"], batch).mean(-1) > before + 0.1).all()
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(cloned["optimizer"]), tree.leaves(moments)))
    calls = []
    agent.pretrain = lambda state: calls.append(int(state["count"]["iterations"].max())) or state
    for _ in range(2):
        cloned, _ = agent.iterate(cloned, world)
    assert calls == [0]


def test_a_warm_start_fills_what_normalises_observations():
    """Cloned on raw observations, a policy would be another one as soon as the first rollout is counted."""
    settings = rl.GAIL(demonstrations=cartpole(), warm_start=200, normalise_observation=True, **TINY)
    agent, state, world = start(settings, "CartPole-fixed")
    steps = agent.rewards[0].demonstrations.transitions()
    batch = {name: steps[name].expand(2, *steps[name].shape) for name in ("observation", "action")}
    before = agent.log_prob(state["params"], batch).mean(-1)
    weights = dict(state["params"]["weights"])
    cloned = agent.pretrain(state)
    statistics = cloned["params"]["normalisers"]["observation"]
    assert statistics["count"].tolist() == [len(steps["action"])] * 2
    torch.testing.assert_close(statistics["mean"][1], steps["observation"].double().mean(0))
    for name, weight in cloned["params"]["weights"].items():
        assert torch.equal(weight, weights[name]) == name.startswith("value."), name
    learned = agent.log_prob(cloned["params"], batch).mean(-1)
    _, rollout = collect(agent, tree.map(torch.clone, cloned), world, 8)
    counted = agent.end_iteration(cloned, rollout)
    assert (counted["params"]["normalisers"]["observation"]["count"] > statistics["count"]).all()
    assert (learned > before + 0.1).all()
    assert (agent.log_prob(counted["params"], batch).mean(-1) > before + 0.1).all()


def test_wrong_settings_of_the_reward_are_refused_by_name():
    made = cartpole()
    for wrong in (
        {"form": "airl"},
        {"updates": -3},
        {"updates": 1.5},
        {"batch_size": 0},
        {"learning_rate": -1},
        {"learning_rate": [0.1, 0.2]},
        {"gradient_penalty": float("nan")},
        {"hidden_sizes": 32},
        {"absorbing": 1},
        {"shuffled": "no"},
        {"name": "task"},
        {"name": "a/b"},
        {"name": None},
    ):
        with pytest.raises(SettingError, match=next(iter(wrong)) + "|named"):
            rl.AdversarialReward(made, **wrong)
    for given in (None, "demo", made.observation):
        with pytest.raises(SettingError, match=r"demonstrations is .*Demonstrations\.load"):
            rl.AdversarialReward(given)
    with pytest.raises(SettingError, match="the class AdversarialReward"):
        rl.PPO(rewards=(rl.AdversarialReward,))


def test_the_order_of_a_dicts_keys_changes_no_input_of_the_discriminator():
    parts = {"b": gym.spaces.Box(-1, 1, (2,), np.float32), "a": gym.spaces.Discrete(3)}
    space = gym.spaces.Dict(list(parts.items()))  # which keeps the order given
    made = demonstrations((5,))
    observed = {"b": torch.rand(6, 2), "a": torch.tensor([0, 1, 2, 0, 1, 2])}
    shown = [
        replace(made, observation=dict(order), observation_space=space)
        for order in (observed.items(), reversed(observed.items()))
    ]
    one, two = (Discriminator(given, (4,), False).shown["input"] for given in shown)
    assert torch.equal(one, two)


def test_a_shuffled_control_tells_nothing_apart():
    """Where the sides are far apart, the discriminator knows them, and knows nothing once they are shuffled."""
    accuracy = {}
    for shuffled in (False, True):
        settings = rl.GAIL(demonstrations=cartpole(), shuffled=shuffled, **{**TINY, "discriminator_updates": 60})
        agent, state, world = start(settings, "CartPole-fixed")
        for _ in range(4):
            state, metrics = agent.iterate(state, world)
        accuracy[shuffled] = metrics["discriminator/accuracy_demonstrations"] + metrics["discriminator/accuracy_agent"]
    assert (accuracy[False] > 1.5).all() and ((accuracy[True] - 1).abs() < 0.2).all()


def test_episodes_that_end_are_warned_of_and_fixed_ones_are_not():
    for task, absorbing, warned in (("CartPole-v1", False, 1), ("CartPole-v1", True, 0), ("CartPole-fixed", False, 0)):
        agent, state, world = start(rl.GAIL(demonstrations=cartpole(), absorbing=absorbing, **TINY), task)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            agent.iterate(state, world)
        found = [str(one.message) for one in caught if "pays for surviving" in str(one.message)]
        assert len(found) == warned


@pytest.mark.parametrize(
    ("settings", "task", "error", "message"),
    [
        ({}, "CartPole-v1", DemonstrationError, "nothing to imitate: give demonstrations="),
        ({"demonstrations": "/nowhere"}, "CartPole-v1", DemonstrationError, "no demonstrations at /nowhere"),
        ({"demonstrations": cartpole()}, "MountainCar-v0", DemonstrationError, "have observation space"),
        ({"demonstrations": cartpole(), "episodes": 9}, "CartPole-v1", DemonstrationError, "expected 1 to 2"),
        ({"demonstrations": cartpole(), "absorbing": True, "gamma": 1.0}, "CartPole-v1", SettingError, "gamma below 1"),
    ],
)
def test_what_cannot_be_imitated_is_refused_before_training(settings, task, error, message):
    with pytest.raises(error, match=message):
        start(rl.GAIL(**settings), task)


def test_other_demonstrations_in_the_middle_of_a_run_are_refused(tmp_path):
    path = str(cartpole().save(tmp_path / "demo"))
    budget = rl.Budget(steps=128, eval_every=1000, final_episodes=2, checkpoint_seconds=0, log_points=2)
    stop = lambda run, line: line["iteration"] == 1  # noqa: E731
    settings = rl.GAIL(demonstrations=path, **TINY)
    rl.train(settings, "CartPole-fixed", out=tmp_path / "run", budget=budget, callbacks=[stop])
    cartpole().shuffled().save(path)
    with pytest.raises(SettingError, match="not those the run began with"):
        rl.resume(tmp_path / "run")


@pytest.mark.parametrize("absorbing", [False, True])
def test_the_discriminator_of_pictures_has_convolutions(absorbing: bool) -> None:
    """Which picture is shown is where the ball is: steps of other columns are told apart."""
    space = gym.spaces.Box(0, 255, (4, 5, 1), np.uint8)
    shown = torch.zeros(41, 4, 5, 1, dtype=torch.uint8)
    shown[:, 1, 2] = 255
    action = torch.zeros(40, dtype=torch.int64)
    expert = demonstrations((40,), observation=shown, action=action, observation_space=space)
    discriminator = Discriminator(expert, (8,), absorbing)
    p = parameters(discriminator, 2, torch.float32)
    assert max(weight.dim() for weight in p["weights"].values()) == 5  # of a convolution, with a learner axis
    own = shown[:40].roll(1, 2)
    inputs = discriminator.encode(own.expand(2, *own.shape), action.expand(2, 40))
    side = {"ends": torch.zeros(2, 40), "valid": torch.ones(2, 40)}
    batch = {
        "demonstrations": {**side, "input": discriminator.shown["input"].expand(2, *inputs.shape[1:])},
        "agent": {**side, "input": inputs},
        "mix": torch.full((2, 40, 1), 0.5),
        "gradient_penalty": torch.ones(2),
    }
    weights = {name: weight.clone().requires_grad_() for name, weight in p["weights"].items()}
    optimizer = torch.optim.Adam(weights.values(), 1e-2)
    for _ in range(30):
        parts = discriminator.losses({**p, "weights": weights}, batch, StepContext(training=True, report=True))
        optimizer.zero_grad()
        sum(parts.values()).sum().backward()  # type: ignore[union-attr]
        optimizer.step()
    trained = {**p, "weights": weights}
    assert (discriminator.logit(trained, batch["demonstrations"]["input"]) > 0).all()
    assert (discriminator.logit(trained, inputs) < 0).all()
    assert discriminator.absorbing_logit(trained).shape == (2,) if absorbing else True

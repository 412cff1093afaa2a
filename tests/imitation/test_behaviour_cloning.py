"""Behaviour cloning: the loss by hand, learners apart, and as good as whom it imitates."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import rlmeta as rl
from rlmeta.data.demonstrations import Demonstrations
from rlmeta.errors import DemonstrationError, SettingError
from rlmeta.functional import tree
from rlmeta.functional.random import make_keys
from rlmeta.imitation.behaviour_cloning import draw
from rlmeta.learning.gradients import StepContext
from rlmeta.runs.record_demonstrations import joined, play
from tests.agents.worlds import Target, start
from tests.imitation.test_gail import cartpole


def test_the_loss_is_the_negative_log_likelihood_and_the_entropy():
    agent, state, _ = start(rl.BehaviourCloning(cartpole(), entropy_coefficient=[0.1, 0.5]), "CartPole-v1", 1)
    batch = draw(agent.transitions, state["key"], 0, 5)
    found = agent.losses(state["params"], batch, StepContext())
    for i, coefficient in enumerate((0.1, 0.5)):
        p = tree.map(lambda leaf, i=i: leaf[i], state["params"])
        logits = agent.forward(agent.policy, "policy", p, batch["observation"][i])["logits"]
        policy = torch.distributions.Categorical(logits=logits)
        torch.testing.assert_close(found["policy"][i], -policy.log_prob(batch["action"][i]).mean())
        torch.testing.assert_close(found["entropy"][i], -coefficient * policy.entropy().mean())


def test_steps_are_drawn_for_every_learner_by_its_own_key():
    transitions = cartpole().transitions()
    both, alone = draw(transitions, make_keys([3, 4]), 7, 6), draw(transitions, make_keys([4]), 7, 6)
    assert torch.equal(both["action"][1], alone["action"][0])
    assert not torch.equal(both["observation"][0], both["observation"][1])
    rows = (both["observation"][0].unsqueeze(1) == transitions["observation"]).all(-1).nonzero()[:, 1]
    assert torch.equal(both["action"][0], transitions["action"][rows])


class Balancer:
    """Somebody who can: pushes to where the pole falls, leans towards the middle."""

    noise_hold = 1

    def initial_memory(self, p, rows):
        return {}

    def act(self, p, observation, memory, key, deterministic=False):
        x, v, theta, omega = observation.unbind(-1)
        return (theta + 0.3 * omega + 0.03 * x + 0.06 * v > 0).long(), memory


def balanced(episodes: int) -> Demonstrations:
    world = rl.task("CartPole-v1").world((1,), episodes)
    return joined(play(Balancer(), {}, world, make_keys([0]), 1, True), world, {})


def test_a_clone_is_as_good_as_its_demonstrator():
    made = balanced(6)
    assert (made.returns == 500).all()
    budget = rl.Budget(steps=400, eval_every=10**4, final_episodes=16)
    settings = rl.BehaviourCloning(made, learning_rate=3e-3, hidden_sizes=(32,))
    run = rl.train(settings, "CartPole-v1", seeds=2, budget=budget)
    assert (run.scores > 450).all()
    assert int(run.state["count"]["env_steps"].max()) == 400
    shuffled = rl.train(replace(settings, demonstrations=made.shuffled()), "CartPole-v1", seeds=2, budget=budget)
    assert (shuffled.scores < 100).all()


def solved(kind: str, as_dict: bool) -> Demonstrations:
    """Episodes of one step that do what `Target` asks for."""
    env = Target(kind, as_dict=as_dict)
    goal = torch.arange(40) % 2
    rows = torch.repeat_interleave(torch.eye(2)[goal], 2, 0)
    actions = {"box": 2.0 * goal.unsqueeze(-1) - 1, "multidiscrete": goal.unsqueeze(-1).expand(-1, 2)}
    actions["multibinary"] = actions["multidiscrete"]
    return Demonstrations(
        observation={"goal": rows, "one": torch.ones(80, dtype=torch.int64)} if as_dict else rows,
        action=actions.get(kind, goal),
        reward=torch.ones(40),
        lengths=torch.ones(40, dtype=torch.int64),
        terminated=torch.ones(40, dtype=torch.bool),
        truncated=torch.zeros(40, dtype=torch.bool),
        observation_space=env.observation_space,
        action_space=env.action_space,
    )


@pytest.mark.parametrize("kind", ["discrete", "shifted", "multidiscrete", "multibinary", "box"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_every_space_can_be_cloned(kind, as_dict):
    problem = rl.task(partial(Target, kind, as_dict=as_dict), name="target")
    settings = rl.BehaviourCloning(
        solved(kind, as_dict), normalise_observation=not as_dict, learning_rate=1e-2, hidden_sizes=(8,), batch_size=16
    )
    run = rl.train(settings, problem, budget=rl.Budget(steps=150, eval_every=10**4, final_episodes=16))
    assert float(run.scores[0]) > 0.9


def test_wrong_settings_are_refused():
    with pytest.raises(DemonstrationError, match="nothing to imitate"):
        start(rl.BehaviourCloning(), "CartPole-v1")
    with pytest.raises(SettingError, match="batch_size is 0"):
        rl.BehaviourCloning(batch_size=0)

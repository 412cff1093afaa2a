"""PPO with a memory: what it learns from is what it acted by, whole sequences, its memory reset within them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.agents.ppo import PPO
from rlmeta.engine.capture import Capture
from rlmeta.envs.native import CartPole
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.collect import LAST_REWARD, collect, remember
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.minibatch import pick
from rlmeta.learning.settings import per_learner_names

S = N = T = 4
SETTINGS = PPO(
    num_envs=N, num_steps=T, num_epochs=2, batch_size=2 * T, hidden_sizes=(5,), memory="gru", memory_size=3,
    sees=("action", "reward", "start"),
)  # fmt: skip
MEMORIES = {
    "gru": SETTINGS,
    "lstm": replace(SETTINGS, memory="lstm"),
    "attention": replace(SETTINGS, memory="attention", memory_size=4, attention_heads=2, context=2),
}
each_memory = pytest.mark.parametrize("memory", MEMORIES)
SHORT = rl.task(CartPole(observe_velocities=False, max_episode_steps=3), name="short")
"""Episodes end within every rollout, by their limit."""


def begun(settings=SETTINGS, problem=SHORT, learners=(S,), seeds=None):
    """An agent, its world and its state."""
    world = problem.world(learners, settings.num_envs)
    agent = settings.bind(world.observation_space, world.action_space)
    keys = random.make_keys(range(S)) if seeds is None else seeds
    hyper = {name: torch.full(learners, float(getattr(settings, name))) for name in per_learner_names(PPO)}
    return agent, world, agent.init(keys, hyper, world)


def rolled(settings=SETTINGS, problem=SHORT, rollouts=2):
    """The second rollout, so that it begins within episodes, and the state before it."""
    agent, world, state = begun(settings, problem)
    for _ in range(rollouts):
        before = tree.map(torch.clone, state)
        state, rollout = collect(agent, state, world, settings.num_steps)
    return agent, before, state, rollout


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("sees", [(), ("action", "reward"), ("start", "reward", "action")])
@each_memory
def test_a_minibatch_has_the_log_probabilities_and_values_that_were_acted_by(memory, sees, shared):
    agent, before, state, rollout = rolled(replace(MEMORIES[memory], sees=sees, share_network=shared))
    assert rollout["memory_reset"].any() and not rollout["memory_reset"].all()
    memory, p = before["memory"], agent.effective_params(state)
    initial = agent.initial_memory(p, (S, N))
    log_probs, values = [], []
    for t in range(T):  # as it was acted, step by step
        step = tree.map(lambda x: x[:, t], {name: x for name, x in rollout.items() if name != "first_memory"})  # noqa: B023
        inputs = agent.recurrence.acting_inputs(step["observation"], memory)
        distribution, value = agent._evaluate(p, inputs, rl.nn.Context())
        log_probs.append(agent.head.log_prob(distribution, step["action"]))
        values.append(value)
        memory = {**agent.answer_at(agent.policy, "policy", p, step["observation"], memory)[1](step["action"])}
        if LAST_REWARD in memory:
            memory[LAST_REWARD] = step["reward"]
        fresh = step["memory_reset"]
        memory = tree.map(
            lambda a, b: torch.where(fresh.reshape(fresh.shape + (1,) * (a.dim() - 2)), a, b),  # noqa: B023
            initial, memory,
        )  # fmt: skip
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-5), memory, state["memory"])
    credited = agent.credit(p, rollout, {"task": rollout["reward"]})
    torch.testing.assert_close(credited["old_log_prob"], torch.stack(log_probs, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(credited["old_value"], torch.stack(values, 1), rtol=0, atol=1e-5)
    index = torch.stack([torch.randperm(N)[:2] for _ in range(S)])
    batch = pick(agent.items(credited, 1), index)
    flat = agent.samples(batch)
    torch.testing.assert_close(agent.log_prob(p, batch), batch["old_log_prob"].sum(-1), rtol=0, atol=1e-5)
    rows = index.unsqueeze(1).expand(S, T, 2)
    torch.testing.assert_close(flat["old_log_prob"], credited["old_log_prob"].gather(2, rows).flatten(1))


@each_memory
def test_what_follows_a_step_is_judged_with_the_memory_after_it(memory):
    """Where an episode goes on, that is the value of the next step; where it is cut, of the true successor."""
    agent, _, state, rollout = rolled(MEMORIES[memory])
    p = agent.effective_params(state)
    inputs = agent.inputs(rollout)
    value = agent._value(p, inputs, rl.nn.Context())
    following = agent.next_inputs(rollout)
    next_value = agent._value(p, following, rl.nn.Context())
    assert following["last"][..., 3].eq(0).all(), "no successor is a start, of a cut step neither"
    assert following["last"][..., 2].equal(rollout["reward"])
    goes_on = ~rollout["memory_reset"][:, :-1]
    assert goes_on.any()
    torch.testing.assert_close(next_value[:, :-1][goes_on], value[:, 1:][goes_on], rtol=0, atol=1e-5)
    assert (next_value[:, :-1] - value[:, 1:])[~goes_on].abs().min() > 1e-5


def test_an_actor_sees_its_last_action_and_reward_and_where_an_episode_starts():
    agent, before, state, rollout = rolled()
    last, begins = agent.inputs(rollout)["last"], agent.inputs(rollout)["begins"]
    assert last.shape == (S, T, N, 4)
    ended = rollout["terminated"] | rollout["truncated"]
    assert begins[:, 1:].equal(ended[:, :-1]) and not begins[:, 0].any()
    starts = torch.cat((before["memory"]["start"].unsqueeze(1) > 0, ended[:, :-1]), 1)
    assert last[..., 3].equal(starts.float())
    for learner, t, row in [(i, j, k) for i in range(S) for j in range(1, T) for k in range(N)]:
        expected = torch.zeros(3)
        if not ended[learner, t - 1, row]:
            expected[rollout["action"][learner, t - 1, row]] = 1.0
            expected[2] = rollout["reward"][learner, t - 1, row]
        assert last[learner, t, row, :3].equal(expected)
    assert state["memory"]["start"].equal(ended[:, -1].float())


def test_a_box_of_actions_is_seen_in_units_of_its_bounds():
    problem = rl.task("Pendulum-v1")
    agent, _, state, rollout = rolled(replace(SETTINGS, sees=("action",)), problem)
    torch.testing.assert_close(agent.inputs(rollout)["last"][:, 1:], rollout["action"][:, :-1] / 2.0)
    torch.testing.assert_close(state["memory"]["last_action"], rollout["action"][:, -1] / 2.0)


@each_memory
def test_batched_is_looped(memory):
    """Losses and their gradients of every learner alone."""
    agent, _, state, rollout = rolled(MEMORIES[memory])
    p = agent.effective_params(state)
    batch = agent.items(agent.credit(p, rollout, {"task": rollout["reward"]}), 1)
    batch["clip_range"] = torch.full((S,), 0.2)

    def total(p, batch):
        weights = {name: w.detach().clone().requires_grad_() for name, w in p["weights"].items()}
        losses = agent.losses({**p, "weights": weights}, batch, StepContext(training=True, report=False))
        summed = torch.stack(list(losses.values())).sum(0)
        return summed, dict(zip(weights, torch.autograd.grad(summed.sum(), list(weights.values()))))

    together, gradients = total(p, batch)
    for i in range(S):
        alone, own = total(tree.map(lambda x: x[i], p), tree.map(lambda x: x[i], batch))  # noqa: B023
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-5)
        for name, gradient in own.items():
            torch.testing.assert_close(gradients[name][i], gradient, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_actions_reach_back_in_time(memory):
    """The gradient of the last step's log-probability goes through the memory to what was observed first, but not over
    the end of an episode."""
    agent, _, state, rollout = rolled(MEMORIES[memory])
    p = agent.effective_params(state)
    inputs = agent.inputs(rollout)
    seen = rollout["observation"].clone().requires_grad_()
    distribution = agent.forward(agent.policy, "policy", p, {**inputs, "observation": seen})
    last = agent.head.log_prob(distribution, rollout["action"])[:, -1]
    (gradient,) = torch.autograd.grad(last.sum(), seen)
    whole = ~inputs["begins"].any(1)
    within = torch.stack([~inputs["begins"][:, t + 1 :].any(1) for t in range(T)], 1)
    assert (gradient[within].abs().sum(-1) > 0).all() and (gradient[~within] == 0).all()
    assert not whole.all()


@each_memory
def test_acting_and_learning_are_recorded_and_change_no_bit(memory):
    """Programs of the engine against the same run without them."""
    results = []
    for records in (True, False):
        agent, world, state = begun(MEMORIES[memory])
        agent.capture = Capture(warm_up=4) if records else None
        for _ in range(6):
            state, _ = agent.iterate(state, world)
        results.append(state)
        if records:
            assert {"steps of the world", "gradient steps", "credit"} <= agent.capture.operations().keys()
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), *results)


@each_memory
def test_a_run_that_was_stopped_goes_on_as_the_one_that_was_not(tmp_path, memory):
    settings = MEMORIES[memory]
    whole = rl.train(settings, SHORT, steps=4 * N * T, seeds=2, final_episodes=4)
    part = rl.train(
        settings, SHORT, steps=4 * N * T, seeds=2, final_episodes=4, out=tmp_path / "run",
        callbacks=[lambda run, metrics: metrics["env_steps"] == 2 * N * T],
    )  # fmt: skip
    assert part.stopped and part.env_steps == 2 * N * T
    resumed = rl.resume(tmp_path / "run")
    assert resumed.env_steps == whole.env_steps
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), resumed.state["params"], whole.state["params"]
    )
    tree.map(
        lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), resumed.state["memory"], whole.state["memory"]
    )


@each_memory
def test_run_act_carries_the_memory_as_an_evaluation_does(memory):
    run = rl.train(MEMORIES[memory], SHORT, steps=N * T, seeds=1, final_episodes=4)
    p = tree.map(lambda leaf: leaf[0], run.agent.effective_params(run.state))
    memory, expected, reward = None, run.agent.initial_memory(p, (1,)), None
    for seed in range(3):
        observation = np.asarray([0.01 * seed, -0.02], np.float32)
        action, memory = run.act(observation, memory, reward)
        key = torch.zeros((), dtype=torch.int64)
        theirs, expected = run.agent.act(p, torch.from_numpy(observation)[None], expected, key, True)
        reward = 0.5 + seed
        expected = {**expected, LAST_REWARD: torch.full((1,), reward)}
        assert action == int(theirs)
        tree.map(torch.testing.assert_close, {**memory, LAST_REWARD: expected[LAST_REWARD]}, expected)
    with pytest.raises(SettingError, match="sees its last reward"):
        run.act(observation, memory)
    with pytest.raises(SettingError, match="this number of observations"):
        run.act(np.stack([observation] * 2), memory, reward)
    with pytest.raises(SettingError, match="memory"):
        run.module()
    plain = rl.train(PPO(num_envs=4, num_steps=4, batch_size=16), SHORT, steps=16, seeds=1, final_episodes=4)
    with pytest.raises(SettingError, match="has none"):
        plain.act(observation, memory)


def test_a_memory_begins_as_its_agent_says_not_with_zeros():
    reset = torch.tensor([[True, False]])
    initial = {"h": torch.full((1, 2, 3), 7.0), "start": torch.ones(1, 2)}
    memory = {"h": torch.zeros(1, 2, 3), "start": torch.zeros(1, 2)}
    transition = rl.envs.world.Transition(*[None] * 6, reset)
    found = remember(memory, initial, transition)
    assert found["h"][0, 0].eq(7).all() and found["h"][0, 1].eq(0).all() and found["start"].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": "none"}, "goes into a memory"),
        ({"sees": ("action", "action")}, "twice"),
        ({"sees": ("colour",)}, "a tuple of action, reward, start"),
        ({"batch_size": 2}, "whole sequences"),
        ({"memory_size": 0}, "memory_size"),
        ({"memory_layers": 0}, "memory_layers"),
        ({"memory": "attention", "memory_size": 12}, "even size"),
        ({"memory": "attention", "memory_size": 8, "context": 0}, "context"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(SettingError, match=said):
        replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    ("name", "hides", "kept"), [("CartPole-v1", "CartPole-positions", slice(0, 4, 2)),
                                ("Pendulum-v1", "Pendulum-positions", slice(0, 2))]
)  # fmt: skip
def test_the_environment_hides_velocities_alone(name, hides, kept):
    """The same states and rewards, a part of the observation."""
    seen, all_ = (rl.task(task).world((), 3) for task in (hides, name))
    key = torch.tensor(3)
    a, b = seen.reset(key), all_.reset(key)
    for t in range(60):
        assert seen.observation(a).equal(all_.observation(b)[..., kept])
        action = random.integers(key, "action", t, (3, *seen.action_space.shape), 2)
        (a, first), (b, second) = seen.step(a, action), all_.step(b, action)
        assert first.reward.equal(second.reward) and first.terminated.equal(second.terminated)
    assert seen.observation_space.shape == (2,)

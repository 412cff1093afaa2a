"""The Decision Transformer: returns to go, sequences within episodes, causality, and acting as it was trained."""

from __future__ import annotations

import torch

import rlmeta as rl
from rlmeta.functional import random, tree
from rlmeta.learning.collect import LAST_REWARD
from rlmeta.nn import Context
from rlmeta.offline.decision_transformer import steps_of
from tests.agents.worlds import start
from tests.offline.data import SETTINGS, recorded


def agent_and_state(**own):
    agent, state, _ = start(SETTINGS["decision_transformer"](recorded(), **own), "Pendulum-v1", 2)
    return agent, state


def test_returns_to_go_are_sums_to_the_end_of_the_episode():
    given = recorded()
    steps, at = steps_of(given), 0
    for length in given.lengths.tolist():
        for t in range(length):
            expected = sum(given.reward[at + t : at + length].double())
            torch.testing.assert_close(steps["returns"][at + t].double(), expected, rtol=1e-6, atol=1e-6)
            assert int(steps["time"][at + t]) == t
        at += length


def test_sequences_end_anywhere_and_begin_with_their_episode():
    agent, state = agent_and_state(context=4)
    batch = agent.windows(state["key"], 200)
    row, time, valid = batch["observation"][..., 0], batch["time"], batch["valid"]
    assert batch["action"].shape == (2, 200, 4, 1) and bool(valid[..., -1].all())
    assert torch.equal(valid.sum(-1), (time[..., -1] + 1).clamp(max=4))
    both = valid[..., 1:] & valid[..., :-1]
    assert torch.equal((row[..., 1:] - row[..., :-1])[both], torch.ones(int(both.sum())))
    assert torch.equal((time[..., 1:] - time[..., :-1])[both], torch.ones(int(both.sum()), dtype=torch.int64))
    assert len(row[..., -1].unique()) == 12 and not torch.equal(row[0], row[1])


def test_an_action_depends_on_nothing_later_and_on_nothing_before_the_episode():
    agent, state = agent_and_state()
    batch = {**agent.windows(state["key"], 5), "valid": torch.ones(2, 5, 3, dtype=torch.bool)}

    def predicted(changed):
        return agent._predicted(state["params"], changed, Context())["mean"]

    whole = predicted(batch)
    for name, steps in (("action", (1, 2)), ("observation", (2,)), ("returns", (2,))):
        changed = batch[name].clone()
        changed[:, :, 1 if name == "action" else 2] += 1.0
        after = predicted({**batch, name: changed})
        assert torch.equal(after[:, :, :2], whole[:, :, :2]), "an action is not seen by its own step"
        assert not torch.equal(after[:, :, 2], whole[:, :, 2]), (name, steps)
    later = {**batch, "valid": torch.tensor([False, True, True]).expand(2, 5, 3)}
    noise = {name: batch[name].clone() for name in ("observation", "action", "returns")}
    for value in noise.values():
        value[:, :, 0] = 7.0
    assert torch.equal(predicted({**later, **noise})[:, :, 1:], predicted(later)[:, :, 1:])
    assert not torch.equal(predicted(later)[:, :, 1:], whole[:, :, 1:])


def test_it_acts_as_it_was_trained():
    """Step by step with the recorded rewards, its actions are those that training predicts from the same sequences."""
    agent, state = agent_and_state(target_return=[3.0, -50.0], return_scale=1.0)
    p = tree.map(lambda leaf: leaf[1::2][:1].expand_as(leaf).clone(), state["params"]["weights"])
    p = {**state["params"], "weights": p}
    assert torch.equal(p["hyper"]["target_return"], torch.tensor([3.0, 3.0, -50.0, -50.0]))
    steps, memory = steps_of(recorded()), agent.initial_memory(p, (4, 2))
    rows = {name: [] for name in ("observation", "action", "returns")}
    to_go = p["hyper"]["target_return"].clone()
    for t in range(5):
        observation = steps["observation"][t].expand(4, 2, 3)
        action, memory = agent.act(p, observation, memory, state["key"], t % 2 == 0)
        for name, value in (("observation", observation[:, 0]), ("action", action[:, 0]), ("returns", to_go)):
            rows[name].append(value)
        last = {name: torch.stack(values[-3:], 1).unsqueeze(1) for name, values in rows.items()}
        time = torch.arange(max(t - 2, 0), t + 1).expand(4, 1, -1)
        batch = {**last, "time": time, "valid": torch.ones_like(time, dtype=torch.bool)}
        expected = 2 * agent._predicted(p, batch, Context())["mean"][:, 0, -1]
        torch.testing.assert_close(action[:, 0], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(memory["to_go"][:, 0], to_go)
        assert torch.equal(action[:, 0], action[:, 1]) and not torch.equal(action[0], action[2])
        reward = recorded().reward[t]
        memory, to_go = {**memory, LAST_REWARD: reward.expand(4, 2)}, to_go - reward


def test_the_best_recorded_return_is_asked_for_by_default():
    agent, state = agent_and_state()
    memory = agent.initial_memory(state["params"], (2, 3))
    assert torch.equal(memory["to_go"], torch.full((2, 3), float(recorded().returns.max())))


def test_a_run_acts_with_a_memory_and_without_the_data(tmp_path):
    given = recorded()
    path = given.save(tmp_path / "data")
    settings = SETTINGS["decision_transformer"](str(path))
    budget = rl.Budget(steps=8, eval_every=8, eval_episodes=1, final_episodes=1)
    run = rl.train(settings, "Pendulum-v1", out=tmp_path / "run", budget=budget)
    path.unlink()
    loaded = rl.load(tmp_path / "run")
    observation = torch.zeros(3).numpy()
    first, memory = loaded.act(observation)
    second, _ = loaded.act(observation, memory, -4.0)
    assert first in run.world.action_space and second in run.world.action_space
    assert float(memory["to_go"]) == float(torch.tensor(float(given.returns.max())))
    assert torch.equal(loaded.evaluate(1).returns, run.evaluation.returns)


def test_discrete_actions_are_sampled_or_the_most_probable():
    import gymnasium as gym

    given = recorded(action_space=gym.spaces.Discrete(3))
    agent = SETTINGS["decision_transformer"](given).bind(given.observation_space, given.action_space)
    assert agent.windows(random.make_keys([0]), 4)["action"].dtype == torch.int64

"""Memory as a setting of every agent: what it learns from is what it acted by; with masks, Dicts and exploration."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import rlmeta as rl
from rlmeta.engine.capture import Capture
from rlmeta.envs.native import CartPole, NativeEnv, Pendulum
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning import off_policy, sequences
from rlmeta.learning.collect import LAST_REWARD, collect, remember
from rlmeta.learning.gradients import StepContext
from rlmeta.nn import Context
from tests.agents.worlds import start

S = N = T = 4
SMALL: dict[str, Any] = {"num_envs": N, "num_steps": T, "hidden_sizes": (5,)}
KINDS: dict[str, dict[str, Any]] = {
    "gru": {"memory": "gru", "memory_size": 3, "sees": ("action", "reward", "start")},
    "lstm": {"memory": "lstm", "memory_size": 3, "memory_layers": 2, "sees": ("action",)},
    "attention": {"memory": "attention", "memory_size": 4, "attention_heads": 2, "context": 3, "sees": ("start",)},
}
AGENTS = {"a2c": rl.A2C, "reinforce": rl.REINFORCE}
SHORT = rl.task(CartPole(observe_velocities=False, max_episode_steps=3), name="short")
"""Episodes end within every rollout, by their limit."""

each_agent = pytest.mark.parametrize("agent", AGENTS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_agent
@each_kind
def test_a_batch_has_the_log_probabilities_and_values_that_were_acted_by(agent, kind):
    agent, state, world = start(AGENTS[agent](**SMALL, **KINDS[kind]), SHORT, S)
    for _ in range(2):  # the second rollout begins within episodes
        memory = tree.map(torch.clone, state["memory"])
        state, rollout = collect(agent, state, world, T)
    assert rollout["memory_reset"].any() and not rollout["memory_reset"].all()
    p = agent.effective_params(state)
    initial, log_probs, values = agent.initial_memory(p, (S, N)), [], []
    for t in range(T):
        step = tree.map(lambda x: x[:, t], {name: x for name, x in rollout.items() if name != "first_memory"})  # noqa: B023
        distribution, after = agent.answer_at(agent.policy, "policy", p, step["observation"], memory)
        values.append(agent.answer_at(agent.value, "value", p, step["observation"], memory)[0])
        log_probs.append(agent.head.log_prob(distribution, step["action"]))
        blank = dict.fromkeys(("observation", "next_observation", "terminated", "truncated", "valid"))
        transition = rl.envs.world.Transition(**blank, reward=step["reward"], memory_reset=step["memory_reset"])
        memory = remember(after(step["action"]), initial, transition)
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-5), memory, state["memory"])
    batch = agent.items(agent.credit(p, rollout, {"task": rollout["reward"]}), 1)
    assert batch["action"].shape[:3] == (S, N, T)
    flat = agent.samples(batch)["observation"]
    found = agent.head.log_prob(agent.forward(agent.policy, "policy", p, flat), agent.samples(batch)["action"])
    torch.testing.assert_close(found, torch.stack(log_probs, 1).flatten(1), rtol=0, atol=1e-5)
    value = agent.forward(agent.value, "value", p, flat)
    torch.testing.assert_close(value, torch.stack(values, 1).flatten(1), rtol=0, atol=1e-5)


@each_agent
@each_kind
def test_batched_is_looped(agent, kind):
    """Losses and their gradients of every learner alone."""
    agent, state, world = start(AGENTS[agent](**SMALL, **KINDS[kind]), SHORT, S)
    state, rollout = collect(agent, state, world, T)
    p = agent.effective_params(state)
    batch = agent.items(agent.credit(p, rollout, {"task": rollout["reward"]}), 1)

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


@each_agent
@each_kind
def test_acting_and_learning_are_recorded_and_change_no_bit(agent, kind):
    results = []
    for records in (True, False):
        made, state, world = start(AGENTS[agent](**SMALL, **KINDS[kind]), SHORT, S)
        made.capture = Capture(warm_up=2) if records else None
        for _ in range(4):
            state, _ = made.iterate(state, world)
        results.append(state)
        if records:
            assert {"steps of the world", "a gradient step"} <= made.capture.operations().keys()
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), *results)


@each_agent
def test_a_run_that_was_stopped_goes_on_as_the_one_that_was_not(tmp_path, agent):
    settings = AGENTS[agent](**SMALL, **KINDS["lstm"])
    given = {"steps": 4 * N * T, "seeds": 2, "final_episodes": 4}
    whole = rl.train(settings, SHORT, **given)
    stops = [lambda run, metrics: metrics["env_steps"] == 2 * N * T]
    part = rl.train(settings, SHORT, **given, out=tmp_path / "run", callbacks=stops)
    assert part.stopped and part.env_steps == 2 * N * T
    resumed = rl.resume(tmp_path / "run")
    for name in ("params", "memory", "optimizer"):
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), resumed.state[name], whole.state[name])


@each_agent
def test_run_act_sees_what_it_did_and_what_that_brought(agent):
    run = rl.train(AGENTS[agent](**SMALL, **KINDS["gru"]), SHORT, steps=N * T, seeds=1, final_episodes=4)
    action, memory = run.act(np.zeros(2, np.float32))
    assert memory["last_action"].argmax() == action and memory["start"] == 0
    assert LAST_REWARD in run.act(np.zeros(2, np.float32), memory, 1.0)[1]


# -------------------------------------------------------------- DQN and SAC: sequences from a replay memory


REPLAYED: dict[str, Any] = {**SMALL, "capacity": 128, "learning_starts": 48, "gradient_steps": 2, "batch_size": 12,
                            "sequence_length": 6}  # fmt: skip
DRQN, RSAC = rl.DQN(**REPLAYED), rl.SAC(**REPLAYED)
SWING = rl.task(Pendulum(observe_velocity=False, max_episode_steps=3), name="swing")
REPLAYS = {"dqn": (DRQN, SHORT), "sac": (RSAC, SWING), "discrete sac": (RSAC, SHORT)}
each_replay = pytest.mark.parametrize("name", REPLAYS)


def shown(output: Any) -> Tensor:
    """Values of actions, or the parameters of a distribution over them."""
    return output if isinstance(output, Tensor) else output["mean" if "mean" in output else "logits"]


@each_replay
@each_kind
def test_drawn_sequences_have_the_outputs_that_were_acted_by(kind, name):
    """As long as the weights stay as they are, those of what followed, too, with the target network's of DQN."""
    settings, task = REPLAYS[name]
    agent, state, world = start(replace(settings, **KINDS[kind]), task, S)
    acting, later = ("q", "target") if name == "dqn" else ("policy", "policy")
    network = getattr(agent, acting)
    told: list[dict[tuple[float, ...], Tensor]] = [{} for _ in range(S)]
    for _ in range(6):
        memory, p = tree.map(torch.clone, state["memory"]), agent.effective_params(state)
        initial = agent.initial_memory(p, (S, N))
        state, rollout = collect(agent, state, world, T)
        for t in range(T):
            step = tree.map(lambda x: x[:, t], {name: x for name, x in rollout.items() if name != "first_memory"})  # noqa: B023
            values, after = agent.answer_at(network, acting, p, step["observation"], memory)
            values = shown(values)
            blank = dict.fromkeys(("observation", "next_observation", "terminated", "truncated", "valid"))
            transition = rl.envs.world.Transition(**blank, reward=step["reward"], memory_reset=step["memory_reset"])
            memory = remember(after(step["action"]), initial, transition)
            for s, row in [(s, row) for s in range(S) for row in range(N)]:
                told[s][tuple(step["observation"][s, row].tolist())] = values[s, row]
        off_policy.remember(agent, state, rollout, {"task": rollout["reward"]})
    gamma = state["params"]["hyper"]["gamma"]
    batch = tree.map(lambda x: x[0], sequences.sample(state["replay"], state["key"].unsqueeze(0), 8, 6, gamma))
    values = shown(agent.forward(network, acting, p, batch["observation"]))
    following = shown(agent.forward(network, later, p, batch["next_observation"]))
    assert batch["observation"]["begins"].any() and not batch["valid"].all()
    met = 0
    for s, row in [(s, row) for s in range(S) for row in range(48) if batch["valid"][s, row]]:
        here, there = (tuple(batch[n]["observation"][s, row].tolist()) for n in ("observation", "next_observation"))
        torch.testing.assert_close(values[s, row], told[s][here], rtol=0, atol=1e-5)
        if there in told[s]:  # else it ended an episode, or is the newest
            torch.testing.assert_close(following[s, row], told[s][there], rtol=0, atol=1e-5)
            met += 1
    assert met > 20


def _reset(begins: Tensor, first: Tensor, now: Tensor) -> Tensor:
    return torch.where(begins.reshape(*begins.shape, *(1,) * (now.dim() - begins.dim())), first, now)


@each_kind
@pytest.mark.parametrize("discrete", [False, True])
def test_critics_of_sac_begin_every_sequence_as_an_episode(kind, discrete):
    """Their values of a whole sequence are those of one step after another, from their own first state."""
    agent, state, world = start(replace(RSAC, **KINDS[kind]), SHORT if discrete else SWING, S)
    for _ in range(6):
        state, rollout = collect(agent, state, world, T)
        off_policy.remember(agent, state, rollout, {"task": rollout["reward"]})
    p, gamma = agent.effective_params(state), state["params"]["hyper"]["gamma"]
    batch = tree.map(lambda x: x[0], sequences.sample(state["replay"], state["key"].unsqueeze(0), 2, 6, gamma))
    together = agent.values(p, "q", batch["observation"], batch["action"], Context())
    body, tensors = agent.q.member.body, {**p["weights"], **p["buffers"]}
    for i in range(2):  # each critic alone
        member = {n.removeprefix("q.member."): w[:, i] for n, w in tensors.items() if n.startswith("q.")}
        hidden = first = body.memory.initial((S, 2), state["key"].device)
        for t in range(6):
            now = {n: x[:, 2 * t : 2 * t + 2] for n, x in batch["observation"].items() if n != "hidden"}
            begins = now.pop("begins")
            hidden = tree.map(partial(_reset, begins), first, hidden)
            features, after = body.step(member, {**now, "hidden": hidden}, Context(), "body.")
            action = batch["action"][:, 2 * t : 2 * t + 2]
            if discrete:
                value = agent.q.member.head.run(member, features, Context(), "head.")
                value = value.gather(-1, action.unsqueeze(-1)).squeeze(-1)
            else:
                joint = torch.cat((features, agent.units.to_policy(action).float()), -1)
                joint = agent.q.member.joint.run(member, joint, Context(), "joint.")
                value = agent.q.member.head.run(member, joint, Context(), "head.")
            torch.testing.assert_close(together[:, i, 2 * t : 2 * t + 2], value, rtol=0, atol=1e-5)
            hidden = after


@each_replay
@each_kind
def test_in_sequences_batched_is_looped_and_burn_in_is_not_learned_from(kind, name):
    settings, task = REPLAYS[name]
    agent, state, world = start(replace(settings, **KINDS[kind]), task, S)
    for _ in range(4):
        state, rollout = collect(agent, state, world, T)
        off_policy.remember(agent, state, rollout, {"task": rollout["reward"]})
    p, gamma = agent.effective_params(state), state["params"]["hyper"]["gamma"]
    draw = partial(sequences.sample, state["replay"], state["key"].unsqueeze(0), 4, 6, gamma)
    batch, burnt = (tree.map(lambda x: x[0], draw(burn_in=burn_in)) for burn_in in (0, 2))
    assert burnt["valid"][:, :8].eq(False).all() and burnt["valid"][:, 8:].equal(batch["valid"][:, 8:])

    def total(p, batch, key):
        weights = {name: w.detach().clone().requires_grad_() for name, w in p["weights"].items()}
        losses = agent.losses({**p, "weights": weights}, batch, StepContext(training=True, key=key, report=False))
        loss = torch.stack(list(losses.values())).sum(0)
        return loss, dict(zip(weights, torch.autograd.grad(loss.sum(), list(weights.values()))))

    together, gradients = total(p, batch, state["key"])
    for i in range(S):
        alone, own = total(tree.map(lambda x: x[i], p), tree.map(lambda x: x[i], batch), state["key"][i])  # noqa: B023
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-5)
        for name, gradient in own.items():
            torch.testing.assert_close(gradients[name][i], gradient, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_nothing_is_learned_before_a_whole_sequence_is_there(name):
    settings, task = REPLAYS[name]
    agent, state, world = start(replace(settings, memory="gru", learning_starts=0), task, S)
    agent.capture, steps = None, []
    for _ in range(2):  # of 4 steps, a sequence has 6
        state, _ = agent.iterate(state, world)
        steps.append(int(state["count"]["gradient_steps"].max()))
    assert steps == [0, 2] and bool(state["active"].all())


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_with_a_memory_it_is_recorded_and_resumed_bit_for_bit(name, tmp_path):
    settings, task = REPLAYS[name]
    settings = replace(settings, **({**KINDS["lstm"], "average_rate": 0.5} if name == "dqn" else KINDS["gru"]))
    results = []
    for records in (True, False):
        agent, state, world = start(settings, task, S)
        agent.capture = Capture(warm_up=2) if records else None
        for _ in range(7):
            state, _ = agent.iterate(state, world)
        results.append(state)
        if records:
            assert {"steps of the world", "gradient steps"} <= agent.capture.operations().keys()
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), *results)
    given = {"steps": 8 * N * T, "seeds": 2, "final_episodes": 4}
    whole = rl.train(settings, task, **given)
    stops = [lambda run, metrics: metrics["env_steps"] == 5 * N * T]
    assert rl.train(settings, task, **given, out=tmp_path / "run", callbacks=stops).stopped
    resumed = rl.resume(tmp_path / "run")
    for name in ("params", "memory", "optimizer", "replay"):
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), resumed.state[name], whole.state[name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 8}, "whole sequences"),
        ({"burn_in": 6}, "leaves nothing"),
        ({"n_steps": 2}, "of one step"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"capacity": 48, "learning_starts": 8}, "expected at least"),
        ({"hindsight": "future"}, "SAC: hindsight draws no sequences"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(changes, said):
    for settings in (DRQN, RSAC):
        if set(changes) <= {field.name for field in fields(settings)}:
            with pytest.raises(SettingError, match=said):
                replace(settings, memory="gru", **changes)


# ---------------------------------------------------------------------- all together


CUES = gym.spaces.Dict(
    {
        "cue": gym.spaces.Box(-1, 1, (1,), np.float32),
        "place": gym.spaces.Discrete(3),
        "action_mask": gym.spaces.MultiBinary(3),
    }
)


@dataclass(frozen=True)
class Corridor(NativeEnv):
    """A cue at the first step says which of two ways is paid at the third; on the way there, it goes on alone.

    Who remembers gets 1, who does not 0 on average.
    """

    max_episode_steps: int | None = None
    reset_noise = 1
    observation_space = CUES
    action_space = gym.spaces.Discrete(3)

    def reset(self, noise: Tensor, physics: Any) -> Any:
        return {
            "cue": (noise[..., 0] < 0.5).float() * 2 - 1,
            "place": torch.zeros_like(noise[..., 0], dtype=torch.int64),
        }

    def step(self, state: Any, action: Tensor, noise: Tensor, physics: Any) -> tuple[Any, Tensor, Tensor]:
        ended = state["place"] == 2
        side = torch.where(action == 2, 1.0, -1.0)
        reward = torch.where(ended, torch.where(action == 0, -1.0, side * state["cue"]), 0.0)
        return {**state, "place": (state["place"] + 1).clamp(max=2)}, reward, ended

    def observe(self, state: Any) -> Any:
        place = state["place"]
        cue = torch.where(place == 0, state["cue"], 0.0).unsqueeze(-1)
        chooses = (place == 2).unsqueeze(-1)
        mask = torch.cat((~chooses, chooses, chooses), -1)
        return {"cue": cue, "place": place, "action_mask": mask.long()}


CORRIDOR = rl.task(Corridor(), name="corridor")
_BONUS = {"rewards": (rl.EpisodicCounts(coefficient=0.01),), "num_envs": 32, "hidden_sizes": (16,)}
LEARNS: dict[str, Any] = {
    "ppo": rl.PPO(
        num_steps=6, num_epochs=4, batch_size=96, learning_rate=3e-3, learning_rate_schedule="constant",
        entropy_coefficient=0.01, **_BONUS,
    ),
    "a2c": rl.A2C(num_steps=6, optimizer="adam", learning_rate=1e-2, entropy_coefficient=0.01, **_BONUS),
    "reinforce": rl.REINFORCE(num_steps=6, learning_rate=1e-2, action_noise=0.05, **_BONUS),
    "sac": rl.SAC(
        num_steps=6, sequence_length=6, batch_size=192, gradient_steps=8, learning_starts=960,
        actor_learning_rate=3e-3, critic_learning_rate=3e-3, temperature_learning_rate=3e-3, initial_temperature=0.1,
        **_BONUS,
    ),
    "dqn": rl.DQN(
        num_steps=6, sequence_length=6, batch_size=192, gradient_steps=4, learning_starts=960, learning_rate=3e-3,
        **_BONUS,
    ),
}  # fmt: skip
REMEMBERS: dict[str, dict[str, Any]] = {
    "gru": {"memory": "gru", "memory_size": 16},
    "lstm": {"memory": "lstm", "memory_size": 16},
    "attention": {"memory": "attention", "memory_size": 16, "attention_heads": 2, "context": 4},
}
PAIRS = [(agent, kind) for agent in LEARNS for kind in REMEMBERS]
QUICK = {("ppo", "gru"), ("a2c", "attention"), ("reinforce", "lstm"), ("dqn", "gru")}


def score(agent, steps=7_680, **memory):
    return rl.train(replace(LEARNS[agent], **memory), CORRIDOR, steps=steps, seeds=2, final_episodes=64).scores


@pytest.mark.parametrize(
    ("agent", "kind"), [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
)
def test_memory_masks_dictionaries_and_exploration_together_are_learned_with(agent, kind):
    """Without a memory half of the episodes are lost, whatever is learned."""
    scores = score(agent, **REMEMBERS[kind], sees=("action",))
    assert scores.min() > 0.9, scores.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("memory", [{}, {**REMEMBERS["attention"], "context": 1}], ids=["none", "short"])
def test_a_cue_further_back_than_an_agent_remembers_is_lost(memory):
    assert score("ppo", **memory).max() < 0.5

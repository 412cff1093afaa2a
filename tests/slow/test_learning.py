"""Learning: presets reach the bars of the tables in docs/measurements.md, on seeds that no setting was chosen on."""

from __future__ import annotations

from dataclasses import replace

import pytest

import rlmeta as rl
from rlmeta.agents.recurrence import MemoryName

pytestmark = pytest.mark.slow

SEEDS = (100, 101, 102, 103)


@pytest.mark.parametrize(
    ("agent", "task", "bar"),
    [
        ("ppo", "CartPole-v1", 475.0),
        ("a2c", "CartPole-v1", 475.0),
        ("reinforce", "CartPole-v1", 475.0),
        ("dqn", "CartPole-v1", 450.0),
        ("ppo", "CartPole-positions", 475.0),
        ("ppo", "bandits", 0.6),  # of 300k of its 1M steps; without a memory 0.5
        ("ppo", "Pendulum-v1", -220.0),
        ("sac", "Pendulum-v1", -165.0),
        ("td3", "Pendulum-v1", -185.0),
        ("ddpg", "Pendulum-v1", -185.0),
        ("trpo", "Pendulum-v1", -210.0),
        ("impala", "CartPole-v1", 450.0),
        ("ppg", "CartPole-v1", 475.0),
        ("sac", "MountainCarContinuous-v0", 90.0),
        ("sac", "PointReach-v0", 0.95),  # without hindsight under 0.2
        ("sac", "Pendulum-positions", -350.0),
        ("dqn", "MountainCar-v0", -150.0),
        ("dqn", "Acrobot-v1", -95.0),
        ("rainbow", "MinAtar/Breakout-v1", 1.0),  # 20k of its 1M steps; at random 0.42
        ("ppo", "TMaze-v0", 0.95),
        ("ppo", "RepeatPrevious-easy", 0.9),  # of 100k of its 200k steps
        ("ppo", "CartPole-noisy-easy", 0.9),
        ("ppo", "Catch-v0", 0.95),
        ("dqn", "Catch-v0", 0.95),
    ],
)
def test_an_agents_preset_learns_its_task(agent: str, task: str, bar: float) -> None:
    settings = rl.preset(agent, task)
    steps = {"ppo": 100_000, "a2c": 500_000, "reinforce": 500_000, "dqn": 50_000, "trpo": 100_000}.get(agent, 12_000)
    steps = 200_000 if agent in ("impala", "ppg") else steps
    longer = {"MountainCar-v0": 120_000, "Acrobot-v1": 100_000, "bandits": 300_000, "MountainCarContinuous-v0": 50_000}
    longer["MinAtar/Breakout-v1"] = 20_000
    longer |= {"TMaze-v0": 500_000, "CartPole-noisy-easy": 250_000, "Catch-v0": 20_000}
    steps = longer.get(task, steps)
    run = rl.train(settings, task, steps=steps, seeds=SEEDS)
    assert run.summary()[0]["iqm"] >= bar, run.scores.tolist()


@pytest.mark.parametrize("memory", ["lstm", "attention"])
def test_every_memory_balances_a_pole_whose_velocities_are_hidden(memory: MemoryName) -> None:
    """With the settings that were chosen for a GRU."""
    settings = replace(rl.preset("ppo", "CartPole-positions"), memory=memory)
    run = rl.train(settings, "CartPole-positions", steps=100_000, seeds=SEEDS)
    assert run.summary()[0]["iqm"] >= 475.0, run.scores.tolist()


def test_maml_adapts_in_one_step() -> None:
    """Squared error on sinusoids never seen; without adapting none is better than 2.98."""
    settings = rl.preset("maml", "sinusoid")
    run = rl.train(settings, "sinusoid", steps=50_000, seeds=SEEDS)
    assert run.scores.mean() <= 1.0, run.scores.tolist()


def test_meta_sgd_adapts_better_in_one_step() -> None:
    """MAML has 0.51 then."""
    run = rl.train(rl.preset("meta_sgd", "sinusoid"), "sinusoid", steps=75_000, seeds=SEEDS)
    assert run.scores.mean() <= 0.35, run.scores.tolist()


def test_curiosity_finds_what_a_random_walk_does_not() -> None:
    """One of a million walks is paid: seven of eight seeds had it, and none of PPO alone."""
    settings = rl.preset("ppo", "DeepSea-20")
    runs = [
        rl.train(replace(settings, rewards=rewards), "DeepSea-20", steps=160_000, seeds=SEEDS, final_episodes=8)
        for rewards in ((rl.RND(),), ())
    ]
    curious, plain = (run.scores for run in runs)
    assert (curious > 0.9).double().mean() >= 0.5 and plain.max() <= 0.0, (curious.tolist(), plain.tolist())


@pytest.mark.parametrize(
    ("method", "least"),
    [(rl.EWC(strength=100.0), 0.9), (rl.PackNet(), 0.9), (rl.HAT(s_max=100.0), 0.9), (rl.Replay(), 0.9)],
)
def test_lifelong_methods_keep_old_tasks(method: object, least: float) -> None:
    stream = rl.stream("split-digits", scenario="task")
    settings = rl.Classifier(hidden_sizes=(100, 100))
    run = rl.train(settings, stream, steps=6_400, seeds=SEEDS, lifelong=[method])
    assert run.scores.mean() >= least, run.matrix[:, -1].tolist()

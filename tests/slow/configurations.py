"""Runs of every kind to be killed: `python -m tests.slow.configurations NAME FOLDER [SECONDS]` trains, or resumes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import rlmeta as rl
from rlmeta.runs.shipped import agent_class


def _demonstrations() -> rl.Demonstrations:
    """The same few episodes in every process: of an untrained policy, which needs no file."""
    run = rl.train(
        rl.PPO(num_envs=2, num_steps=8, batch_size=16, hidden_sizes=(4,)), "CartPole-v1", steps=16, threads=1
    )
    return rl.record(run, episodes=10)


def _agent(
    settings: Callable[[], Any], task: Callable[[], Any], steps: int, population: Any = None, **budget: Any
) -> Callable[..., rl.Run]:
    def train(folder: str, seconds: float) -> rl.Run:
        chosen = rl.Budget(
            steps=steps, checkpoint_seconds=seconds, final_episodes=8, eval_episodes=4, log_points=50, **budget
        )
        return rl.train(settings(), task(), seeds=2, budget=chosen, out=folder, threads=1, population=population)

    return train


def _stream(settings: Any, name: str, steps: int, methods: list[Any], **about: Any) -> Callable[..., rl.Run]:
    def train(folder: str, seconds: float) -> rl.Run:
        chosen = rl.Budget(steps=steps, checkpoint_seconds=seconds, final_episodes=8, eval_episodes=4, log_points=50)
        stream = rl.stream(name, **about)
        return rl.train(settings, stream, seeds=2, budget=chosen, out=folder, threads=1, lifelong=methods)

    return train


_GAIL = {"num_steps": 128, "batch_size": 256, "num_envs": 8}
_PPO = {"num_envs": 4, "num_steps": 64, "batch_size": 64}
_REPLAYED = {"capacity": 2_000, "learning_starts": 200, "batch_size": 32, "hidden_sizes": (32, 32)}
_REWARDS = (rl.RND(batch_size=64, hidden_sizes=(16,)),)
_CLASSIFIER = rl.Classifier(hidden_sizes=(50, 50))
_CONTROL = rl.PPO(num_steps=64, batch_size=128)

CONFIGURATIONS: dict[str, Callable[..., rl.Run]] = {
    "ppo": _agent(lambda: rl.preset("ppo", "CartPole-v1"), lambda: rl.task("CartPole-v1"), 8_192),
    "ppo-target": _agent(
        lambda: rl.preset("ppo", "CartPole-v1"), lambda: rl.task("CartPole-v1"), 16_384, target=60.0, eval_every=1_024
    ),
    "ppo-gymnasium": _agent(
        lambda: rl.PPO(**_PPO, normalise_observation=True, normalise_reward=True),
        lambda: rl.task("CartPole-v1", native=False),
        4_096,
    ),
    "ppo-gru": _agent(
        lambda: rl.PPO(**_PPO, num_epochs=2, memory="gru", memory_size=8, sees=("action", "reward", "start")),
        lambda: rl.task("CartPole-positions"),
        8_192,
    ),
    "ppo-attention": _agent(
        lambda: rl.PPO(**_PPO, num_epochs=2, memory="attention", memory_size=8, attention_heads=2, context=16),
        lambda: rl.task("CartPole-positions"),
        8_192,
    ),
    "a2c-lstm": _agent(
        lambda: rl.A2C(num_steps=16, memory="lstm", memory_size=8, memory_layers=2, sees=("action", "reward")),
        lambda: rl.task("CartPole-positions"),
        20_000,
    ),
    "rl2": _agent(
        lambda: replace(rl.preset("ppo", "bandits"), num_envs=8, batch_size=120, memory_size=16),
        lambda: rl.family("bandits"),
        7_200,
    ),
    "ppo-rnd": _agent(lambda: rl.PPO(**_PPO, rewards=_REWARDS), lambda: rl.task("MountainCar-v0"), 8_192),
    "ppo-async": _agent(lambda: rl.PPO(**_PPO), lambda: rl.task("Pendulum-v1", native=False, mode="async"), 4_096),
    "dqn": _agent(lambda: rl.preset("dqn", "CartPole-v1"), lambda: rl.task("CartPole-v1"), 6_000),
    "dqn-gru": _agent(
        lambda: rl.DQN(num_steps=8, memory="gru", memory_size=8, sees=("action",), capacity=4_000, burn_in=2),
        lambda: rl.task("CartPole-positions"),
        6_000,
    ),
    "rainbow": _agent(lambda: rl.Rainbow(**_REPLAYED, target_every=50), lambda: rl.task("CartPole-v1"), 3_000),
    "sac": _agent(lambda: rl.SAC(**_REPLAYED), lambda: rl.task("Pendulum-v1"), 3_000),
    "td3": _agent(lambda: rl.TD3(**_REPLAYED), lambda: rl.task("Pendulum-v1", native=False), 3_000),
    "sac-gsde": _agent(
        lambda: rl.SAC(**_REPLAYED, state_dependent_exploration=True), lambda: rl.task("Pendulum-v1"), 3_000
    ),
    "sac-hindsight": _agent(
        lambda: rl.SAC(**_REPLAYED, hindsight="future"),
        lambda: rl.task("rlmeta.envs.native.register:rlmeta/PointReach-v0"),
        3_000,
    ),
    "sac-gru": _agent(
        lambda: rl.SAC(num_steps=8, memory="gru", memory_size=8, sees=("action", "reward"), burn_in=2, **_REPLAYED),
        lambda: rl.task("Pendulum-positions"),
        2_000,
    ),
    "sac-discrete": _agent(lambda: rl.SAC(**_REPLAYED), lambda: rl.task("CartPole-v1"), 3_000),
    "trpo": _agent(
        lambda: rl.TRPO(num_steps=64, state_dependent_exploration=True), lambda: rl.task("Pendulum-v1"), 8_192
    ),
    "impala": _agent(lambda: rl.IMPALA(), lambda: rl.task("CartPole-v1"), 12_800),
    "ppg": _agent(
        lambda: rl.PPG(num_steps=64, batch_size=128, auxiliary_every=4), lambda: rl.task("CartPole-v1"), 12_800
    ),
    "ddpg": _agent(lambda: rl.DDPG(**_REPLAYED), lambda: rl.task("Pendulum-v1", native=False), 3_000),
    "a2c": _agent(lambda: rl.A2C(learning_rate=[3e-4, 1e-3]), lambda: rl.task("CartPole-v1"), 20_000),
    "reinforce": _agent(lambda: rl.preset("reinforce", "CartPole-v1"), lambda: rl.task("CartPole-v1"), 20_000),
    "gail": _agent(lambda: rl.GAIL(demonstrations=_demonstrations(), **_GAIL), lambda: rl.task("CartPole-v1"), 8_192),
    "maml": _agent(
        lambda: rl.MAML(rl.Regressor(hidden_sizes=(40, 40)), inner_steps=1), lambda: rl.family("sinusoid"), 8_000
    ),
    "maml-rl": _agent(
        lambda: rl.MAML(rl.REINFORCE(num_steps=20, num_envs=4), num_envs=32),
        lambda: rl.family("navigation-short"),
        20_000,
    ),
    "protonet": _agent(lambda: rl.ProtoNet(hidden_sizes=(32,)), lambda: rl.family("few-shot-digits"), 8_000),
    "population": _agent(
        lambda: rl.A2C(learning_rate=[1e-4, 1e-3, 1e-2, 1e-1]),
        lambda: rl.task("CartPole-v1", max_episode_steps=100),
        20_000,
        rl.PBT(every=2_000, fraction=0.5),
    ),
    "own": _agent(
        lambda: agent_class("my_agent:MyAgent")(learning_rate=[1e-3, 3e-3]), lambda: rl.task("CartPole-v1"), 20_000
    ),
    "learned-optimizer": _agent(
        lambda: rl.preset("learned_optimizer", "quadratics"), lambda: rl.family("quadratics"), 20_000
    ),
    "ewc": _stream(_CLASSIFIER, "split-digits", 1_600, [rl.EWC(strength=100.0)], scenario="class", order=2),
    "packnet": _stream(_CLASSIFIER, "split-digits", 1_600, [rl.PackNet()], scenario="task"),
    "gem": _stream(_CLASSIFIER, "split-digits", 1_600, [rl.GEM(memory=50)], scenario="task"),
    "replay": _stream(_CLASSIFIER, "split-digits", 1_600, [rl.Replay(size=100)], scenario="class"),
    "generative-replay": _stream(
        _CLASSIFIER, "split-digits", 1_600, [rl.GenerativeReplay(latent=8, hidden_sizes=(50,))], scenario="class"
    ),
    "ewc-replay": _stream(
        _CLASSIFIER, "split-digits", 1_600, [rl.EWC(strength=100.0), rl.Replay(size=100)], scenario="domain"
    ),
    "ewc-agem": _stream(
        _CLASSIFIER, "split-digits", 1_600, [rl.EWC(strength=[10.0, 100.0]), rl.AGEM(memory=50)], scenario="domain"
    ),
    "si-lwf": _stream(_CLASSIFIER, "split-digits", 1_600, [rl.SI(), rl.LwF()], scenario="task"),
    "mas-der": _stream(_CLASSIFIER, "split-digits", 1_600, [rl.MAS(samples=50), rl.DER(size=50)], scenario="class"),
    "rwalk-er-ace": _stream(_CLASSIFIER, "split-digits", 1_600, [rl.RWalk(), rl.ERACE(size=50)], scenario="class"),
    "control-l2-lwf": _stream(_CONTROL, "cartpole-conflicts", 2_048, [rl.L2(), rl.LwF()]),
    "control-packnet": _stream(_CONTROL, "cartpole-conflicts", 2_048, [rl.PackNet()]),
    "control-ewc-replay": _stream(_CONTROL, "cartpole-conflicts", 2_048, [rl.EWC(), rl.Replay()]),
}


def go(name: str, folder: str, seconds: float) -> None:
    """Begin the run, or go on with it where a checkpoint is there."""
    if (Path(folder) / "state" / "manifest.json").exists():
        again = {"gail": {"demonstrations": _demonstrations}, "ppo-rnd": {"rewards": lambda: _REWARDS}}.get(name, {})
        own = {setting: make() for setting, make in again.items()}
        rl.resume(folder, own=own, code=["my_agent"] if name == "own" else [])
    else:
        CONFIGURATIONS[name](folder, seconds)


if __name__ == "__main__":
    go(sys.argv[1], sys.argv[2], float(sys.argv[3]))

"""Baselines: Stable-Baselines3 and sb3-contrib with rl-zoo's published settings, evaluated as rlmeta's agents are.

`python -m rlmeta.bench.peers ppo CartPole-v1 --steps 100000 --seeds 0,1 --out runs/results/sb3` appends one JSON line
per seed to `sb3.jsonl` and skips what is there already, so it can be killed and started again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch

from rlmeta.errors import RlmetaError, SettingError, UnknownNameError, missing_extra

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import VecEnv

EVALUATION_ENVS = 32
EVALUATION_EPISODES = 256  # 8 in each environment: short episodes are not over-represented


@dataclass(frozen=True)
class Linear:
    """A setting falling linearly to zero over training: rl-zoo's `lin_<start>`."""

    start: float

    def __call__(self, progress_remaining: float) -> float:
        """The value where `progress_remaining` (1 at the start, 0 at the end) of the training is left."""
        return self.start * progress_remaining


WIDE = {"net_arch": [256, 256]}

PENDULUM_NOISE = {
    "n_timesteps": 20_000,
    "noise_std": 0.1,
    "gamma": 0.98,
    "buffer_size": 200_000,
    "learning_starts": 10_000,
    "gradient_steps": 1,
    "train_freq": 1,
    "learning_rate": 1e-3,
    "policy_kwargs": {"net_arch": [400, 300]},
}

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("a2c", "CartPole-v1"): {"n_timesteps": 500_000, "n_envs": 8, "ent_coef": 0.0},
    ("ppo", "CartPole-v1"): {
        "n_timesteps": 100_000,
        "n_envs": 8,
        "n_steps": 32,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 20,
        "ent_coef": 0.0,
        "learning_rate": Linear(0.001),
        "clip_range": Linear(0.2),
    },
    ("ppo", "Acrobot-v1"): {
        "n_timesteps": 1_000_000,
        "normalize": True,
        "n_envs": 16,
        "n_steps": 256,
        "gae_lambda": 0.94,
        "gamma": 0.99,
        "n_epochs": 4,
        "ent_coef": 0.0,
    },
    ("ppo", "Pendulum-v1"): {
        "n_timesteps": 100_000,
        "n_envs": 4,
        "n_steps": 1024,
        "gae_lambda": 0.95,
        "gamma": 0.9,
        "n_epochs": 10,
        "ent_coef": 0.0,
        "learning_rate": 1e-3,
        "clip_range": 0.2,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    ("ppo", "LunarLander-v3"): {
        "n_timesteps": 1_000_000,
        "n_envs": 16,
        "n_steps": 1024,
        "batch_size": 64,
        "gae_lambda": 0.98,
        "gamma": 0.999,
        "n_epochs": 4,
        "ent_coef": 0.01,
    },
    ("ppo", "Hopper-v5"): {
        "n_timesteps": 1_000_000,
        "normalize": True,
        "n_steps": 512,
        "batch_size": 32,
        "gae_lambda": 0.99,
        "gamma": 0.999,
        "n_epochs": 5,
        "ent_coef": 0.00229519,
        "learning_rate": 9.80828e-5,
        "clip_range": 0.2,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
        "policy_kwargs": WIDE | {"log_std_init": -2, "ortho_init": False, "activation_fn": torch.nn.ReLU},
    },
    ("recurrent_ppo", "CartPole-positions"): {
        "n_timesteps": 100_000,
        "normalize": True,
        "n_envs": 8,
        "n_steps": 32,
        "batch_size": 256,
        "gae_lambda": 0.8,
        "gamma": 0.98,
        "n_epochs": 20,
        "ent_coef": 0.0,
        "learning_rate": Linear(0.001),
        "clip_range": Linear(0.2),
        "policy_kwargs": {
            "ortho_init": False,
            "activation_fn": torch.nn.ReLU,
            "lstm_hidden_size": 64,
            "enable_critic_lstm": True,
            "net_arch": [64],
        },
    },
    ("trpo", "Pendulum-v1"): {
        "n_timesteps": 100_000,
        "n_envs": 2,
        "n_steps": 1024,
        "gamma": 0.9,
        "n_critic_updates": 15,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    ("sac", "Pendulum-v1"): {"n_timesteps": 20_000, "learning_rate": 1e-3},
    ("sac", "LunarLanderContinuous-v3"): {
        "n_timesteps": 500_000,
        "batch_size": 256,
        "learning_rate": Linear(7.3e-4),
        "learning_starts": 10_000,
        "gamma": 0.99,
        "tau": 0.01,
        "policy_kwargs": {"net_arch": [400, 300]},
    },
    ("td3", "Pendulum-v1"): PENDULUM_NOISE,
    ("ddpg", "Pendulum-v1"): PENDULUM_NOISE,
    ("dqn", "CartPole-v1"): {
        "n_timesteps": 50_000,
        "learning_rate": 2.3e-3,
        "batch_size": 64,
        "buffer_size": 100_000,
        "learning_starts": 1000,
        "gamma": 0.99,
        "target_update_interval": 10,
        "train_freq": 256,
        "gradient_steps": 128,
        "exploration_fraction": 0.16,
        "exploration_final_eps": 0.04,
        "policy_kwargs": WIDE,
    },
    ("dqn", "Acrobot-v1"): {
        "n_timesteps": 100_000,
        "learning_rate": 6.3e-4,
        "batch_size": 128,
        "buffer_size": 50_000,
        "learning_starts": 0,
        "gamma": 0.99,
        "target_update_interval": 250,
        "train_freq": 4,
        "gradient_steps": -1,
        "exploration_fraction": 0.12,
        "exploration_final_eps": 0.1,
        "policy_kwargs": WIDE,
    },
    ("dqn", "MountainCar-v0"): {
        "n_timesteps": 120_000,
        "learning_rate": 4e-3,
        "batch_size": 128,
        "buffer_size": 10_000,
        "learning_starts": 1000,
        "gamma": 0.98,
        "target_update_interval": 600,
        "train_freq": 16,
        "gradient_steps": 8,
        "exploration_fraction": 0.2,
        "exploration_final_eps": 0.07,
        "policy_kwargs": WIDE,
    },
}
"""(agent, task) -> rl-zoo3's settings (DLR-RM/rl-baselines3-zoo, commit 22e3ff2, `hyperparams/AGENT.yml`;
Hopper-v4's and CartPoleNoVel-v1's stand under rlmeta's names of these tasks).

The names are rl-zoo's. Four are about the run and the rest are arguments of the SB3 class, whose defaults hold where
none is given: `n_timesteps` the budget the settings were published for, `n_envs` environments stepped together
(1 if absent), `normalize` observations and rewards through `VecNormalize` (off if absent), `noise_std` the deviation
of Gaussian noise on actions (none if absent). Every policy is `MlpPolicy`, or `MlpLstmPolicy`. REINFORCE has no
counterpart in SB3.
"""


def train_sb3(
    agent: str, task: str, steps: int, seed: int, changes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Train an SB3 agent with rl-zoo's settings on one thread; evaluate its final parameters.

    Args:
        agent: `ppo`, or another that `SETTINGS` has.
        task: a gymnasium id, or `CartPole-positions`, that `SETTINGS` has for the agent.
        steps: environment steps to train for; SB3 rounds up to whole rollouts.
        seed: of parameters, exploration and training environments; evaluation environments get others.
        changes: arguments of the SB3 class that differ from rl-zoo's.

    Returns:
        `returns`: undiscounted raw returns of 256 greedy episodes, 8 in each of 32 environments; `steps` really
        taken; `seconds` and `cpu_seconds` of the training alone; `steps_per_second` and
        `steps_per_cpu_second`, the one to trust where the process shares its core or was paused.

    Raises:
        UnknownNameError: `SETTINGS` has no such pair.
        SettingError: `steps` is not positive.
        MissingExtraError: stable-baselines3 or sb3-contrib is not installed.
    """
    if (agent, task) not in SETTINGS:
        known = ", ".join(" ".join(pair) for pair in sorted(SETTINGS))
        raise UnknownNameError(f"no rl-zoo settings for {agent!r} on {task!r}: choose one of {known}.")
    if steps < 1:
        raise SettingError(f"steps is {steps}: give a positive number of environment steps.")
    with _one_thread():
        model = _build(agent, task, seed, changes)
        wall, cpu = time.perf_counter(), time.process_time()
        model.learn(steps)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        returns = _evaluate(model, agent, task, seed)
    return {
        "returns": returns,
        "steps": model.num_timesteps,
        "seconds": wall,
        "cpu_seconds": cpu,
        "steps_per_second": model.num_timesteps / wall,
        "steps_per_cpu_second": model.num_timesteps / cpu,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread inside, as many as before outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _build(agent: str, task: str, seed: int, changes: Mapping[str, Any] = MappingProxyType({})) -> BaseAlgorithm:
    """The untrained SB3 model of `SETTINGS[agent, task]` with these changes, with its training environments."""
    settings = {**SETTINGS[agent, task], **changes}
    envs = _environments(task, settings.pop("n_envs", 1), seed, settings.pop("normalize", False), settings.get("gamma"))
    del settings["n_timesteps"]
    if "noise_std" in settings:
        settings["action_noise"] = _action_noise(envs, settings.pop("noise_std"))
    policy = "MlpLstmPolicy" if agent == "recurrent_ppo" else "MlpPolicy"
    return _algorithm(agent)(policy, envs, seed=seed, device="cpu", **settings)


def _algorithm(agent: str) -> type[BaseAlgorithm]:
    """SB3's or sb3-contrib's class of this name."""
    try:
        import sb3_contrib
        import stable_baselines3 as sb3
    except ImportError as error:
        raise missing_extra("stable-baselines3 or sb3-contrib", "bench", "training a baseline") from error
    algorithms: dict[str, type[BaseAlgorithm]] = {
        "a2c": sb3.A2C,
        "ddpg": sb3.DDPG,
        "dqn": sb3.DQN,
        "ppo": sb3.PPO,
        "recurrent_ppo": sb3_contrib.RecurrentPPO,
        "sac": sb3.SAC,
        "td3": sb3.TD3,
        "trpo": sb3_contrib.TRPO,
    }
    return algorithms[agent]


def _action_noise(envs: VecEnv, deviation: float) -> NormalActionNoise:
    """Gaussian noise of this deviation in every coordinate of an action, whose unit SB3 scales to [-1, 1]."""
    from stable_baselines3.common.noise import NormalActionNoise

    assert isinstance(envs.action_space, gymnasium.spaces.Box)
    zeros = np.zeros(envs.action_space.shape)
    return NormalActionNoise(zeros, zeros + deviation)


def _positions_only() -> gymnasium.Env[Any, Any]:
    """CartPole that shows the positions of cart and pole, without their velocities."""
    env = gymnasium.make("CartPole-v1")
    shown = env.observation_space
    assert isinstance(shown, gymnasium.spaces.Box)
    space = gymnasium.spaces.Box(shown.low[[0, 2]], shown.high[[0, 2]])
    return gymnasium.wrappers.TransformObservation(env, lambda state: state[[0, 2]], space)


def _environments(task: str, count: int, seed: int, normalize: bool, gamma: float | None) -> VecEnv:
    """`count` monitored environments in this process, seeded `seed`, `seed + 1`, ..."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = make_vec_env(_positions_only if task == "CartPole-positions" else task, n_envs=count, seed=seed)
    if not normalize:
        return envs
    return VecNormalize(envs) if gamma is None else VecNormalize(envs, gamma=gamma)


def _evaluate(model: BaseAlgorithm, agent: str, task: str, seed: int) -> list[float]:
    """Raw returns of `EVALUATION_EPISODES` greedy episodes, with the normaliser of the training, frozen."""
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

    envs = _environments(
        task,
        EVALUATION_ENVS,
        seed=1_000_000 + 1000 * seed,  # far from any training environment's
        normalize=SETTINGS[agent, task].get("normalize", False),
        gamma=None,
    )
    if isinstance(envs, VecNormalize):
        training_envs = model.get_env()
        assert training_envs is not None
        sync_envs_normalization(training_envs, envs)
        envs.training = False  # rewards need nothing: the monitors inside report raw returns
    returns, _ = evaluate_policy(
        model, envs, n_eval_episodes=EVALUATION_EPISODES, deterministic=True, return_episode_rewards=True
    )
    assert isinstance(returns, list)
    return [float(value) for value in returns]


def recorded(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; a last line cut short by a kill is removed from the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def record_sb3(agent: str, task: str, steps: int | None, seeds: Sequence[int], out: Path) -> None:
    """Append `train_sb3` of every seed to `<out>/sb3.jsonl`, but for those it holds at this budget already.

    `steps=None` takes the budget rl-zoo published the settings for.
    """
    if steps is None:
        steps = SETTINGS.get((agent, task), {}).get("n_timesteps", 1)  # an unknown pair is refused by train_sb3
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sb3.jsonl"
    for seed in seeds:
        name = {"agent": agent, "task": task, "budget": steps, "seed": seed}
        if any(name.items() <= line.items() for line in recorded(path)):
            continue
        result = train_sb3(agent, task, steps, seed)
        with path.open("a") as file:
            file.write(json.dumps(name | result) + "\n")
        mean = sum(result["returns"]) / len(result["returns"])
        print(f"{agent} {task} seed {seed}: {mean:.1f}, {result['steps_per_cpu_second']:.0f} steps/CPU s", flush=True)


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the Stable-Baselines3 baselines: train, append to `sb3.jsonl`, return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlmeta.bench.peers", description=__doc__.split("\n\n")[0])
    parser.add_argument("agent", help="ppo, or another that SETTINGS has")
    parser.add_argument("task", help="a gymnasium id, or CartPole-positions")
    parser.add_argument("--steps", type=int, help="environment steps (default: rl-zoo's budget)")
    parser.add_argument("--seeds", type=_seeds, default=[0], help="comma-separated (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/results/sb3"), help="folder of sb3.jsonl")
    options = parser.parse_args(arguments)
    try:
        record_sb3(options.agent, options.task, options.steps, options.seeds, options.out)
    except RlmetaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

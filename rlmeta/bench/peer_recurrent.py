"""Baseline with a memory: sb3-contrib's RecurrentPPO on native tasks, evaluated as rlmeta's agents are.

`python -m rlmeta.bench.peer_recurrent CartPole-noisy-easy --steps 1000000 --seeds 0 --out runs/results/sb3` appends one
JSON line per seed to `sb3.jsonl`, as `rlmeta.bench.peers` does. It needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlmeta.bench.peers import EVALUATION_ENVS, EVALUATION_EPISODES, Linear, recorded
from rlmeta.envs.names import read_named
from rlmeta.envs.native.register import NativeVectorEnv
from rlmeta.errors import RlmetaError, SettingError, missing_extra, unknown_name

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-noisy-easy": {
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
    "RepeatPrevious-easy": {"n_envs": 8},
}
"""Task -> arguments of RecurrentPPO with `MlpLstmPolicy`, whose defaults hold where none is given, and `n_envs`.

CartPole has rl-zoo3's settings of CartPoleNoVel-v1 (commit 038ab16, `hyperparams/ppo_lstm.yml`). RepeatPrevious, for
which rl-zoo3 has none, has sb3-contrib's defaults.
"""


def train_sb3_contrib(task: str, steps: int, seed: int) -> dict[str, Any]:
    """Train sb3-contrib's RecurrentPPO on one thread; evaluate its final parameters.

    Args:
        task: a name that `SETTINGS` has.
        steps: environment steps to train for, rounded up to whole rollouts.
        seed: of parameters, exploration and training environments; evaluation environments get others.

    Returns:
        `returns`: undiscounted raw returns of 256 greedy episodes, 8 in each of 32 environments; `steps` really
        taken; `seconds` and `cpu_seconds` of the training alone, and steps a second of both.

    Raises:
        UnknownNameError: `SETTINGS` has no such task.
        SettingError: `steps` is not positive.
        MissingExtraError: sb3-contrib is not installed.
    """
    if task not in SETTINGS:
        raise unknown_name("task of this baseline", task, SETTINGS)
    if steps < 1:
        raise SettingError(f"steps is {steps}: give a positive number of environment steps.")
    try:
        from sb3_contrib import RecurrentPPO
        from stable_baselines3.common.evaluation import evaluate_policy
    except ImportError as error:
        raise missing_extra("sb3-contrib", "bench", "training a baseline") from error
    torch.set_num_threads(1)
    settings = dict(SETTINGS[task])
    envs = native_rows(task, settings.pop("n_envs"), seed)
    model = RecurrentPPO("MlpLstmPolicy", envs, seed=seed, device="cpu", **settings)
    wall, cpu = time.perf_counter(), time.process_time()
    model.learn(steps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    fresh = native_rows(task, EVALUATION_ENVS, 1_000_000 + 1000 * seed)  # far from any training environment's
    returns, _ = evaluate_policy(
        model, fresh, n_eval_episodes=EVALUATION_EPISODES, deterministic=True, return_episode_rewards=True, warn=False
    )
    assert isinstance(returns, list)
    return {
        "returns": [float(value) for value in returns],
        "steps": model.num_timesteps,
        "seconds": wall,
        "cpu_seconds": cpu,
        "steps_per_second": model.num_timesteps / wall,
        "steps_per_cpu_second": model.num_timesteps / cpu,
    }


def native_rows(task: str, count: int, seed: int) -> VecEnv:
    """Create `count` environments of a named native task, stepped as a batch, in Stable-Baselines3's protocol."""
    from stable_baselines3.common.vec_env import VecEnv

    table = read_named("envs", task)
    assert table is not None
    constants = dict(table["settings"])
    rows = NativeVectorEnv(table["env"], count, constants, constants.pop("max_episode_steps", None))

    class Rows(VecEnv):
        """Adapter of a gymnasium vector environment with SAME_STEP autoreset."""

        def __init__(self) -> None:
            super().__init__(count, rows.single_observation_space, rows.single_action_space)

        def reset(self) -> Any:
            return rows.reset(seed=seed)[0]

        def step_async(self, actions: np.ndarray[Any, Any]) -> None:
            self.actions = actions

        def step_wait(self) -> Any:
            observation, reward, terminated, truncated, infos = rows.step(self.actions)
            done = terminated | truncated
            each: list[dict[str, Any]] = [{} for _ in range(count)]
            for row in done.nonzero()[0]:
                limit = bool(truncated[row] and not terminated[row])
                each[row] = {"terminal_observation": infos["final_obs"][row], "TimeLimit.truncated": limit}
            return observation, reward.astype(np.float32), done, each

        def close(self) -> None:
            rows.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(rows, attr_name, None)] * count

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            raise NotImplementedError("environments that are stepped as a batch have no attributes of their own")

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            raise NotImplementedError("environments that are stepped as a batch have no methods of their own")

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * count

    return Rows()


def record(task: str, steps: int, seeds: Sequence[int], out: Path) -> None:
    """Append `train_sb3_contrib` of every seed to `<out>/sb3.jsonl`, but for those it holds at this budget already."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sb3.jsonl"
    for seed in seeds:
        name = {"agent": "recurrent ppo", "task": task, "budget": steps, "seed": seed}
        if any(name.items() <= line.items() for line in recorded(path)):
            continue
        result = train_sb3_contrib(task, steps, seed)
        with path.open("a") as file:
            file.write(json.dumps(name | result) + "\n")
        mean = sum(result["returns"]) / len(result["returns"])
        print(f"{task} seed {seed}: {mean:.3f}, {result['steps_per_cpu_second']:.0f} steps/CPU s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the baseline: train, append to `sb3.jsonl`, return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlmeta.bench.peer_recurrent", description=__doc__.split("\n\n")[0])
    parser.add_argument("task", help=f"one of {', '.join(SETTINGS)}")
    parser.add_argument("--steps", type=int, default=1_000_000, help="environment steps (default: 1000000)")
    parser.add_argument("--seeds", default="0", help="comma-separated (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/results/sb3"), help="folder of sb3.jsonl")
    options = parser.parse_args(arguments)
    try:
        record(options.task, options.steps, [int(seed) for seed in options.seeds.split(",")], options.out)
    except RlmetaError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

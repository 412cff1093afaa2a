"""Baseline: PPO by rejax, in an environment of its own that needs nothing of rlmeta.

`PYTHON peer_rejax.py '{"task": "CartPole-v1", "episode_steps": 500, "seeds": 16, "steps": 100000, "settings": {...}}'`
prints one line of JSON: the steps, the seconds of training once everything is compiled, the seconds of the first call,
which compiles, and mean final returns.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

FIRST_SEED = 100
EVALUATION_EPISODES = 64


def train(task: str, episode_steps: int, seeds: int, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train as many seeds at once with equal settings, twice; the second time is measured.

    Args:
        task: by its name in gymnax.
        episode_steps: after which an episode of the evaluation is cut.
        seeds: learners.
        steps: environment steps of each.
        settings: in the names of `rejax.PPO.create`.
    """
    import jax
    from rejax import PPO
    from rejax.evaluate import evaluate

    algorithm = PPO.create(env=task, total_timesteps=steps, eval_freq=steps, skip_initial_evaluation=True, **settings)
    algorithm = algorithm.replace(eval_callback=lambda algorithm, state, key: ())
    run = jax.jit(jax.vmap(algorithm.train))

    def measured(first: int) -> tuple[float, Any]:
        keys = jax.vmap(jax.random.PRNGKey)(jax.numpy.arange(first, first + seeds))
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(run(keys))
        return time.perf_counter() - begin, state

    compiling, _ = measured(FIRST_SEED + seeds)
    seconds, state = measured(FIRST_SEED)

    def score(state: Any) -> Any:
        act = algorithm.make_act(state)
        key = jax.random.PRNGKey(0)
        return evaluate(act, key, algorithm.env, algorithm.env_params, EVALUATION_EPISODES, episode_steps)[1].mean()

    scores = [float(x) for x in jax.jit(jax.vmap(score))(state)]
    return {"steps": steps * seeds, "seconds": seconds, "first_call": compiling, "scores": scores}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(train(**job)))

"""Program that trains IQL or TD3+BC of d3rlpy, for `rlmeta bench offline --d3rlpy PYTHON`.

Its interpreter has d3rlpy but not rlmeta, so nothing of rlmeta is imported here. Argument: a JSON object with
`algorithm`, `data` (an npz of the steps), `steps`, `seed`, `task`, `final_episodes` and the settings of rlmeta's
algorithm. Prints a JSON object with `seconds` and `score`, the mean return of the greedy policy.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

if __name__ == "__main__":
    import d3rlpy
    import gymnasium as gym
    import numpy as np
    import torch

    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    d3rlpy.seed(job["seed"])
    env: Any = gym.make(job["task"])
    data = np.load(job["data"])
    dataset = d3rlpy.dataset.MDPDataset(
        data["observation"], data["action"], data["reward"][:, None], data["terminated"], data["truncated"]
    )
    scaler = d3rlpy.preprocessing.StandardObservationScaler() if job["normalise_observation"] else None
    encoder = d3rlpy.models.encoders.VectorEncoderFactory(list(job["hidden_sizes"]), activation=job["activation"])
    common = {
        "batch_size": job["batch_size"],
        "gamma": job["gamma"],
        "tau": job["target_rate"],
        "n_critics": job["critics"],
        "actor_learning_rate": job["actor_learning_rate"],
        "critic_learning_rate": job["critic_learning_rate"],
        "actor_encoder_factory": encoder,
        "critic_encoder_factory": encoder,
        "observation_scaler": scaler,
        "action_scaler": d3rlpy.preprocessing.MinMaxActionScaler(env.action_space.low, env.action_space.high),
    }
    if job["algorithm"] == "iql":
        config = d3rlpy.algos.IQLConfig(
            **common,
            value_encoder_factory=encoder,
            expectile=job["expectile"],
            weight_temp=job["beta"],
            max_weight=job["largest_weight"],
        )
    else:
        config = d3rlpy.algos.TD3PlusBCConfig(
            **common,
            alpha=job["alpha"],
            target_smoothing_sigma=job["target_noise"],
            target_smoothing_clip=job["target_noise_clip"],
            update_actor_interval=job["policy_delay"],
        )
    algorithm = config.create(device="cpu")
    began = time.perf_counter()
    algorithm.fit(
        dataset,
        n_steps=job["steps"],
        n_steps_per_epoch=job["steps"],
        show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    )
    seconds = time.perf_counter() - began
    scores = []
    for episode in range(job["final_episodes"]):
        observation, _ = env.reset(seed=job["seed"] + episode)
        total, over = 0.0, False
        while not over:
            action = algorithm.predict(np.asarray(observation, dtype=np.float32)[None])[0]
            observation, reward, terminated, truncated, _ = env.step(action)
            total, over = total + float(reward), terminated or truncated
        scores.append(total)
    print(json.dumps({"seconds": seconds, "score": float(np.mean(scores))}))

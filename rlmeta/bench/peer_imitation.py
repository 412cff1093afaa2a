"""Program that times GAIL of the package imitation, for `rlmeta bench imitation --speed`.

Its interpreter has the package imitation but not rlmeta, so nothing of rlmeta is imported here. Argument: a JSON object
with `demonstrations` (an npz of obs, acts, next_obs, dones), `steps`, `seed` and the settings below. Prints a JSON
object with `seconds` and `steps`.
"""

from __future__ import annotations

import json
import sys
import time

if __name__ == "__main__":
    import numpy as np
    import seals  # noqa: F401 - registers seals/CartPole-v0
    from imitation.algorithms.adversarial.gail import GAIL
    from imitation.data.types import Transitions
    from imitation.rewards.reward_nets import BasicRewardNet
    from imitation.util.networks import RunningNorm
    from imitation.util.util import make_vec_env
    from stable_baselines3 import PPO

    job = json.loads(sys.argv[1])
    recorded = np.load(job["demonstrations"])
    infos = np.array([{}] * len(recorded["acts"]))
    demonstrations = Transitions(recorded["obs"], recorded["acts"], infos, recorded["next_obs"], recorded["dones"])
    envs = make_vec_env("seals/CartPole-v0", rng=np.random.default_rng(job["seed"]), n_envs=job["num_envs"])
    learner = PPO(
        "MlpPolicy", envs, n_steps=job["num_steps"], batch_size=job["batch_size"], n_epochs=job["num_epochs"],
        learning_rate=job["learning_rate"], gamma=job["gamma"], seed=job["seed"], device="cpu",
    )  # fmt: skip
    reward = BasicRewardNet(
        envs.observation_space, envs.action_space, hid_sizes=job["hidden_sizes"], normalize_input_layer=RunningNorm
    )
    trainer = GAIL(
        demonstrations=demonstrations, demo_batch_size=job["discriminator_batch_size"],
        gen_replay_buffer_capacity=job["num_envs"] * job["num_steps"],
        n_disc_updates_per_round=job["discriminator_updates"], venv=envs, gen_algo=learner, reward_net=reward,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train(job["steps"])
    print(json.dumps({"seconds": time.perf_counter() - began, "steps": job["steps"]}))

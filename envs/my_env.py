"""Your own environment. Copy this file and change it; `python envs/my_env.py` checks it.

rlmeta train ppo my_env:MyEnv-v0 --env.size 7
"""

import gymnasium as gym
import numpy as np


class MyEnv(gym.Env):
    """A walk along a line of `size` cells to a goal; every step costs 0.1, the goal gives 1."""

    def __init__(self, size: int = 5, render_mode: str | None = None):
        self.size, self.render_mode = size, render_mode
        self.observation_space = gym.spaces.Box(0.0, 1.0, (2,), np.float32)  # where we are, where the goal is
        self.action_space = gym.spaces.Discrete(2)  # left, right

    def reset(self, *, seed=None, options=None):
        """Two different cells; chance comes from self.np_random alone, so that a seed repeats its episode."""
        super().reset(seed=seed)
        self.position, self.goal = (int(cell) for cell in self.np_random.choice(self.size, 2, replace=False))
        return self._observation(), {}

    def step(self, action):
        """`terminated` ends the task (nothing follows), truncation is left to max_episode_steps below."""
        self.position = int(np.clip(self.position + (1 if action == 1 else -1), 0, self.size - 1))
        terminated = self.position == self.goal
        return self._observation(), 1.0 if terminated else -0.1, terminated, False, {}

    def _observation(self):
        return np.array([self.position, self.goal], np.float32) / (self.size - 1)


gym.register("MyEnv-v0", entry_point=f"{__name__}:MyEnv", max_episode_steps=50)

if __name__ == "__main__":
    from gymnasium.utils.env_checker import check_env

    check_env(gym.make("MyEnv-v0").unwrapped)
    first, again = (MyEnv(size=7).reset(seed=3)[0] for _ in range(2))
    assert (first == again).all(), "the same seed must start the same episode"
    print("MyEnv-v0 is fine: rlmeta train ppo my_env:MyEnv-v0 --env.size 7")

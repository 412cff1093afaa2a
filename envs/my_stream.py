"""Your own stream of tasks. Copy this file and change it; `python envs/my_stream.py` checks it.

A stream of native or gymnasium tasks alone can be written without code, see cartpole-conflicts.toml.
"""

import rlmeta as rl
from rlmeta.functional.random import make_keys


def my_stream() -> rl.TaskStream:
    """Three tasks that one agent meets in turn; their spaces must be the same."""
    tasks = [
        rl.task("CartPole-v1"),
        rl.task("CartPole-v1", name="moon", settings={"gravity": 1.6}),
        rl.task("cartpole-long-pole"),
    ]
    return rl.stream(tasks, name="my-stream")


if __name__ == "__main__":
    stream = my_stream()
    worlds = [task.world((1,), 2) for task in stream.tasks]
    for task, world in zip(stream.tasks, worlds):
        assert world.observation_space == worlds[0].observation_space, f"{task.name} has other observations"
        assert world.action_space == worlds[0].action_space, f"{task.name} has other actions"
        world.reset(make_keys([0]))
        world.close()
    print(f"{stream.name} is fine: {', '.join(task.name for task in stream.tasks)}")

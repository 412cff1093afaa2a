"""Record demonstrations: whole episodes of one of a run's learners, in fresh environments."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from rlmeta.data.demonstrations import Demonstrations
from rlmeta.envs.kinds import evaluated
from rlmeta.envs.streams import TaskStream
from rlmeta.envs.world import EVALUATION_LIMIT, World
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.collect import Actor, remember
from rlmeta.learning.evaluate import evaluation_rows
from rlmeta.learning.state import Params
from rlmeta.runs.run import Run
from rlmeta.runs.surroundings import undisturbed


@undisturbed()
def record(
    run: Run,
    episodes: int,
    *,
    learner: int | None = None,
    best: bool = False,
    deterministic: bool = True,
    seed: int = 0,
) -> Demonstrations:
    """Record demonstrations: roll out whole episodes of one of a run's learners.

    Args:
        run: the run of an agent, on native or gymnasium's environments.
        episodes: number of episodes.
        learner: the learner's index; by default the best in the final evaluation.
        best: use the parameters of its best periodic evaluation instead of the final ones.
        deterministic: take the policy's mode instead of sampling actions.
        seed: seed of the episodes.

    Raises:
        SettingError: no such learner, no best parameters, or the run is not of an agent on a single task.
    """
    if not run.agent.acts or isinstance(run.experiment.problem, TaskStream):
        what = f"a run of {run.experiment.agent_name} on {run.experiment.problem.name}"
        raise SettingError(f"{what} can't be recorded: give one of an agent that acts in a single task")
    learner = run.chosen_learner(learner)
    p = run.agent.effective_params(run.best_state() if best else run.state)
    agent: Any = run.agent
    alone = tree.map(lambda leaf: leaf[learner : learner + 1], {"p": p, "key": run.state["key"]})
    task: Any = evaluated(run.experiment.problem)
    world = task.world((1,), evaluation_rows(episodes, task.native))
    try:
        key = random.fold(random.fold(alone["key"], "demonstrations"), seed)
        rows = play(agent, alone["p"], world, key, episodes // world.num_envs, deterministic)
    finally:
        world.close()
    about = {
        "agent": run.experiment.agent_name,
        "task": task.name,
        "learner": learner,
        "deterministic": deterministic,
        "seed": seed,
    }
    return joined(rows, world, about)


@torch.no_grad()
def play(
    agent: Actor, p: Params, world: World, key: Tensor, rounds: int, deterministic: bool
) -> list[list[dict[str, Any]]]:
    """Roll out the first `rounds` episodes of every environment of one learner, as a list of steps for each.

    Every environment plays the same number, so that short episodes are not over-represented. An episode that does not
    end within `EVALUATION_LIMIT` steps, or the longer limit that its environment declares, is cut there, as by a time
    limit, with a warning.
    """
    played = _Played(world.num_envs, rounds, max(EVALUATION_LIMIT, world.max_episode_steps or 0))
    begun, t = 0, 0
    while played.any_left():  # once, unless an episode was cut
        state = world.reset(key if begun == 0 else random.fold(random.fold(key, "after a cut"), begun))
        memory = initial = agent.initial_memory(p, (1, world.num_envs))
        played.waits = [False] * world.num_envs
        while played.any_going():
            observation = world.observation(state)
            step_key = random.fold(key, t // agent.noise_hold)
            action, memory = agent.act(p, observation, memory, step_key, deterministic)
            state, transition = world.step(state, action)
            memory = remember(memory, initial, transition)
            rest = {name: value for name, value in transition._asdict().items() if name != "observation"}
            played.add({**rest, "observation": observation, "action": _legal(action, world)})
            t += 1
        begun += 1
    played.warn_of_cuts(world.name)
    return played.rows


class _Played:
    """Recorded steps of the episodes so far, by environment.

    An environment whose episode was cut cannot start another one by itself: it waits until all others are done or wait
    as well.

    Args:
        num_envs: number of environments.
        rounds: episodes of each environment.
        limit: steps after which an episode is cut.
    """

    def __init__(self, num_envs: int, rounds: int, limit: int) -> None:
        self.rows: list[list[dict[str, Any]]] = [[] for _ in range(num_envs)]
        self.waits = [False] * num_envs
        self._rounds, self._limit = rounds, limit
        self._finished, self._length, self._cuts = [0] * num_envs, [0] * num_envs, 0

    def any_left(self) -> bool:
        """Whether an environment still has episodes to play."""
        return min(self._finished) < self._rounds

    def any_going(self) -> bool:
        """Whether an environment is within an episode, or may start one without a reset of all."""
        return any(self._is_going(row) for row in range(len(self.rows)))

    def add(self, step: dict[str, Any]) -> None:
        """Append a step `[1, N, ...]` to the episodes of the environments that are still playing."""
        for row in range(len(self.rows)):
            if not self._is_going(row) or not bool(step["valid"][0, row]):
                continue
            own = tree.map(lambda leaf, row=row: leaf[0, row].clone(), step)
            self.rows[row].append(own)
            self._length[row] += 1
            ended = bool(own["terminated"] | own["truncated"])
            if self._length[row] >= self._limit and not ended:
                own["truncated"] = torch.ones_like(own["truncated"])
                self.waits[row], ended, self._cuts = True, True, self._cuts + 1
            if ended:
                self._finished[row], self._length[row] = self._finished[row] + 1, 0

    def warn_of_cuts(self, name: str) -> None:
        """Warn if episodes were cut, and how many."""
        if self._cuts:
            total = self._rounds * len(self.rows)
            warnings.warn(
                f"{name}: {self._cuts} of {total} recorded episodes did not end within {self._limit} steps and were "
                "cut there: give the task max_episode_steps=",
                RuntimeWarning,
                stacklevel=2,
            )

    def _is_going(self, row: int) -> bool:
        return self._finished[row] < self._rounds and not self.waits[row]


def _legal(action: Tensor, world: World) -> Tensor:
    """Clip continuous actions to the bounds of the action space."""
    if not action.is_floating_point():
        return action
    space: Any = world.action_space
    low, high = (torch.as_tensor(bound, device=action.device).to(action) for bound in (space.low, space.high))
    return action.clamp(low, high)


def joined(rows: list[list[dict[str, Any]]], world: World, about: dict[str, Any]) -> Demonstrations:
    """Concatenate the episodes of all environments to demonstrations."""
    observations: list[tree.Tree] = []
    steps: list[dict[str, Any]] = []
    ends: list[tuple[int, bool]] = []
    since = 0
    for step in (step for row in rows for step in row):
        observations.append(step["observation"])
        steps.append(step)
        if bool(step["terminated"] | step["truncated"]):
            observations.append(step["next_observation"])
            # as in losses, `terminated` wins if an environment reports both
            ends.append((len(steps) - since, bool(step["terminated"])))
            since = len(steps)
    return Demonstrations(
        observation=tree.map(lambda *leaves: torch.stack(leaves), *observations),
        action=torch.stack([step["action"] for step in steps]),
        reward=torch.stack([step["reward"] for step in steps]).float(),
        lengths=torch.tensor([length for length, _ in ends], device="cpu"),
        terminated=torch.tensor([terminated for _, terminated in ends], device="cpu"),
        truncated=torch.tensor([not terminated for _, terminated in ends], device="cpu"),
        observation_space=world.observation_space,
        action_space=world.action_space,
        about=about,
    )

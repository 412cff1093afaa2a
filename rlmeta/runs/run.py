"""A run as a value: what was trained, its state, its evaluations; and how it is read back from its folder."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlmeta.agents.agent import NetworkFactory
from rlmeta.data import spaces
from rlmeta.envs.streams import TaskStream
from rlmeta.errors import CheckpointError, SettingError, SpaceError
from rlmeta.functional import random, statistics, tree
from rlmeta.functional.packed import Packed
from rlmeta.learning.collect import LAST_REWARD
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.learner import Learner
from rlmeta.learning.method import Method
from rlmeta.learning.populations import begin as begin_population
from rlmeta.learning.settings import require
from rlmeta.learning.state import State, select
from rlmeta.lifelong import metrics
from rlmeta.runs import budgets, checkpoint, extension, populations, prediction, stages
from rlmeta.runs import folder as run_folder
from rlmeta.runs.configuration import from_config, within_memory
from rlmeta.runs.experiment import Experiment
from rlmeta.runs.memory import keep_freed_memory
from rlmeta.runs.module import TrainedModule, names_of
from rlmeta.runs.records import NAMES, Mark, check_start
from rlmeta.runs.stages import Stage
from rlmeta.runs.surroundings import undisturbed

SAID = ("seconds", "stopped", "offsets", "run", "config")
"""What the checkpoint of a run says of itself and a reader relies on."""


class Run:
    """An experiment and where it stands.

    Attributes:
        experiment: settings, seeds, task, budget with nothing left to be chosen.
        agent: bound to the task's spaces.
        world: the environments of its learners.
        iterations: of training on every task.
        state: everything it is.
        folder: where it is saved, or None.
        evaluation: of the final parameters, once it has ended.
        seconds: of wall time it trained, over all its resumes.
        stopped: why it ended before its budget, or ''.
        offsets: where each of its records was at the checkpoint it was read from.
        id: what it is told apart by.
        config_digest: the sha256 of its `config.toml`, once that is written.
        held: the lock on its folder, while this process writes it.
        begun_from: the folder of the run whose weights it began with, or ''.
        extended_to: the steps it is trained for where it was given more than config.toml says, else 0.
        old_end: the iteration at which it ended before it was given more just now, else 0.
    """

    def __init__(self, experiment: Experiment, folder: Path | None) -> None:
        self.folder = None if folder is None else folder.absolute()  # an environment may change the current one
        self.id, self.config_digest = secrets.token_hex(8), ""
        self.held: run_folder.Hold | None = None
        experiment.use_threads()
        keep_freed_memory()
        self.world = experiment.world()
        try:
            self.agent: Learner = experiment.bind(self.world)
            self.iterations = budgets.iterations_of(experiment.problem, self.agent, self.world, experiment.budget)
            budget = budgets.settled(experiment.budget, experiment.problem, self.world, self.iterations, self.every)
        except BaseException:
            self.world.close()
            raise
        self.experiment = dataclasses.replace(experiment, budget=budget)
        self.state: State = {}
        self.evaluation: Evaluation | None = None
        self.seconds = 0.0
        self.stopped = ""
        self.offsets: dict[str, Mark] = {}
        self.extended_to = self.old_end = 0
        self.begun_from = ""
        self._actions = 0

    @property
    def every(self) -> int:
        """What of its budget each learner spends in an iteration."""
        steps: int = self.world.num_envs * self.agent.steps_per_iteration
        return steps

    def start(self) -> None:
        """Set the state to that of a run that begins.

        Raises:
            SettingError, HookError: what was given does not work together.
        """
        _ = self.stages
        self.state = self.agent.init(self.experiment.keys(), self.experiment.hyper(), self.world)
        if self.stream is not None:
            self.state = stages.start(self.state, self.stream)
        if self.experiment.population is not None:
            self.state = begin_population(self.state)

    @property
    def stages(self) -> list[Stage]:
        """What it goes through: a single stage, or the phases of every task of a stream."""
        return stages.stages_of(self.experiment.problem, self.agent.methods, self.iterations)

    @property
    def stream(self) -> TaskStream | None:
        """The stream it learns from, if it is one."""
        problem = self.experiment.problem
        return problem if isinstance(problem, TaskStream) else None

    @property
    def matrix(self) -> Tensor:
        """Scores on a stream, `[S, T + 1, T]`: in row i those on every learner's tasks after its first i were trained.

        Columns are places in each learner's own order; NaN where nothing was measured yet.

        Raises:
            SettingError: the run is not on a stream.
        """
        if self.stream is None:
            raise SettingError(f"{self.experiment.problem.name} is a single problem: only a stream has a matrix")
        matrix: Tensor = self.state["matrix"]
        return matrix

    # ------------------------------------------------------------------ what a reader asks

    @property
    def env_steps(self) -> int:
        """Environment steps of each learner so far."""
        return int(self.state["count"]["env_steps"].max())

    @property
    def scores(self) -> Tensor:
        """The mean score of every learner's final evaluation, `[S]`.

        Of a stream: the mean over its tasks, each of which counts the same however many samples or classes it has.
        `lifelong.metrics.accuracy(run.matrix, run.evaluation.lengths)` lets every test sample count the same.

        Raises:
            SettingError: there was none yet.
        """
        if self.evaluation is None:
            raise SettingError("the run has not ended: `rlmeta resume` it, or call run.evaluate()")
        return self.evaluation.returns.mean(-1)

    @undisturbed()
    def evaluate(self, episodes: int, *, deterministic: bool = True, best: bool = False, seed: int = 0) -> Evaluation:
        """Try every learner on `episodes` fresh episodes, on as many of every task of a stream.

        Args:
            episodes: of each learner.
            deterministic: the policy's mode, or a sample.
            best: the parameters of each learner's best periodic evaluation instead of the final ones.
            seed: another seed plays other episodes.
        """
        state = self.best_state() if best else self.state
        world = self.evaluation_world(episodes)
        try:
            key = random.fold(random.fold(state["key"], "evaluation"), seed)
            if self.stream is None:
                return self.agent.evaluate(self.agent.seen(state), world, key, episodes, deterministic=deterministic)
            orders = self.experiment.orders
            found = stages.evaluate_tasks(
                self.agent, state, world, self.stream, orders, key, episodes, deterministic=deterministic
            )
            return Evaluation(*(torch.cat(parts, -1) for parts in zip(*found)))
        finally:
            world.close()

    def best_state(self) -> State:
        """The state with the parameters of every learner's best periodic evaluation; a learner that never had a finite
        score keeps its final ones.

        Raises:
            SettingError: there was no periodic evaluation, or none with a finite score.
        """
        if "best" not in self.state:
            raise SettingError("no best parameters: the run has had no periodic evaluation (--eval-every sets them)")
        best, params = self.state["best"], self.state["params"]
        scored = best["score"].isfinite()
        if not bool(scored.any()):
            raise SettingError("no best parameters: no periodic evaluation gave a finite score")
        chosen = select(scored, best["params"], {name: dict(params[name]) for name in best["params"]})
        return {**self.state, "params": {**params, **chosen}}

    def evaluation_world(self, episodes: int) -> Any:
        """Fresh rows of the problem to play `episodes` episodes in."""
        rows = self.agent.evaluation_rows(episodes, self.experiment.problem.native)
        return self.experiment.world(rows)

    @undisturbed()
    @torch.no_grad()
    def act(
        self,
        observation: Any,
        memory: Any = None,
        reward: Any = None,
        *,
        deterministic: bool = True,
        learner: int | None = None,
    ) -> Any:
        """The action for one observation of the task, ready for `env.step`, or those for a batch of them.

        Args:
            observation: as the environment gives it, or as a vector environment gives a batch: with one axis more in
                front.
            memory: of an agent with a memory, what the call before it returned; None at the start of an episode.
            reward: what the last action brought, a number or one for each of the batch, where the agent sees rewards.
            deterministic: the policy's mode, or a sample.
            learner: which one acts; by default the best in the final evaluation.

        Returns:
            The action; of an agent with a memory the action and its memory.

        Raises:
            SettingError: no such learner, none of them has a finite score to be the best by, or a memory or reward
                that the agent has no use for, or lacks.
            SpaceError: the observation is not of the task's observation space.
        """
        if not self.agent.acts:
            raise SettingError(f"a run of {self.experiment.agent_name} does not act: run.module() predicts")
        learner, state = self.chosen_learner(learner), self.state
        p = tree.map(lambda leaf: leaf[learner], self.agent.seen(state))
        batch = spaces.batch_size(self.world.observation_space, observation)
        rows = () if batch is None else (batch,)
        given = spaces.to_tree(self.world.observation_space, observation, rows)
        if any(bool(leaf.isnan().any()) for leaf in tree.leaves(given) if leaf.is_floating_point()):
            raise SpaceError("the observation to act on holds NaN")
        if batch is None:
            given = tree.map(lambda x: x.unsqueeze(0), given)
        self._actions += 1
        key = random.fold(random.fold(state["key"][learner], "act"), self._actions)
        agent: Any = self.agent
        initial = agent.initial_memory(p, (batch or 1,))
        before = initial if memory is None else told(initial, memory, reward)
        action, after = agent.act(p, given, before, key, deterministic)
        action = spaces.to_numpy(self.world.action_space, action[0] if batch is None else action, rows)
        return (action, after) if initial else action

    @undisturbed()
    def predict(
        self, support: Any, query: Any, *, steps: int | None = None, learner: int | None = None, best: bool = False
    ) -> Tensor:
        """What a meta-learner says of new inputs once it is shown some samples of their task.

        Args:
            support: (inputs `[n, ...]`, targets `[n, ...]`) of a task, arrays or tensors; or of K tasks at once,
                `[K, n, ...]` each.
            query: inputs `[B, ...]`, or `[K, B, ...]`.
            steps: of adaptation; by default as many as in training. A prototypical network takes none.
            learner: which one answers; by default the best in the final evaluation.
            best: the parameters of its best periodic evaluation instead of the final ones.

        Returns:
            Predictions `[B, D]`, or of classes the probabilities `[B, ways]`; with K tasks `[K, B, ...]`.

        Raises:
            SettingError: the run's learner does not learn from such tasks; support and query do not fit together; a
                class has no sample; steps is negative.
            SpaceError: inputs or targets are not of the tasks' spaces.
        """
        agent: Any = self.agent
        if not agent.answers:
            raise SettingError(f"a run of {self.experiment.agent_name} is not shown tasks: MAML's and ProtoNet's are")
        chosen, state = self.chosen_learner(learner), self.best_state() if best else self.state
        device, spaces_ = state["key"].device, (self.world.observation_space, self.world.action_space)
        shown, asked, several = prediction.asked(*spaces_, support, query, device)
        p = tree.map(lambda leaf: leaf[chosen], agent.seen(state))
        said: Tensor = agent.answer(p, shown, asked, steps)
        said = said.softmax(-1) if agent.classes else said
        return said if several else said[0]

    def module(self, learner: int | None = None, name: str | None = None, *, best: bool = False) -> TrainedModule:
        """A trained network of one learner as an `nn.Module` on batches of observations, ready for `torch.export`.

        Args:
            learner: which one; by default the best in the final evaluation.
            name: "policy", "value", "q", "net": one of the learner's networks, by default the one it acts by, which
                gives logits, means and deviations, or action values; or "action" for the deterministic action itself.
                Of MAML it is the inner learner's, with the initial weights.
            best: the parameters of its best periodic evaluation instead of the final ones.

        Raises:
            SettingError, UnknownNameError: no such learner or network.
        """
        agent: Any = self.agent
        inner = getattr(agent, "inner", agent)
        chosen, state = self.chosen_learner(learner), self.best_state() if best else self.state
        p = tree.map(lambda leaf: leaf[chosen], self.agent.seen(state))
        return TrainedModule(inner, p, name or names_of(inner)[0]).eval()

    def chosen_learner(self, learner: int | None) -> int:
        """The learner of this number; by default the best in the final evaluation, or the first if there was none.

        Raises:
            SettingError: there is no such learner, or none that is the best.
        """
        if learner is None:
            return self.best_learner if self.evaluation is not None else 0
        if not 0 <= learner < len(self.experiment.learners):
            raise SettingError(f"learner {learner}: the run has learners 0 to {len(self.experiment.learners) - 1}")
        return learner

    @property
    def best_learner(self) -> int:
        """The one with the best final score.

        Raises:
            SettingError: no learner has a finite score.
        """
        return self.agent.score.best(self.scores)

    def summary(self) -> list[dict[str, Any]]:
        """One row for each variant: its label, IQM with 95 % interval, mean, steps, seconds, steps/s."""
        steps = self.env_steps
        scores = self.scores.reshape(-1, self.experiment.repeats).cpu().numpy()
        rows = []
        became = populations.summary(self)
        for label, score, transfer, about in zip(self.experiment.labels, scores, self._transfer(), became):
            low, high = statistics.stratified_bootstrap_interval(score[:, None], statistics.iqm)
            rows.append(
                {
                    "agent": self.experiment.agent_name,
                    "task": self.experiment.problem.name,
                    "setting": label,
                    "score": self.agent.score.name,
                    "seeds": len(self.experiment.seeds),
                    "iqm": float(statistics.iqm(score[:, None])),
                    "low": float(low),
                    "high": float(high),
                    "mean": float(score.mean()),
                    "scores": [float(one) for one in score],
                    "not_finite": int((~np.isfinite(score)).sum()),
                    "episodes": int(self.evaluation.returns.shape[-1]) if self.evaluation else 0,
                    "steps": steps,
                    "seconds": round(self.seconds, 1),
                    "steps_per_second": round(steps * len(self.experiment.learners) / max(self.seconds, 1e-9)),
                    **transfer,
                    **about,
                }
            )
        return rows

    def _transfer(self) -> list[dict[str, float]]:
        """What every variant kept and gained along a stream, means over its learners with their 95 % intervals (`BWT`,
        `BWT_low`, `BWT_high`, ...), and in how many orders; nothing of a single problem."""
        if self.stream is None:
            return [{} for _ in self.experiment.labels]
        matrices = self.matrix.reshape(-1, self.experiment.repeats, *self.matrix.shape[1:]).cpu().numpy()
        names = {"BWT": "backward_transfer", "FWT": "forward_transfer", "forgetting": "forgetting"}
        orders = self.experiment.repeats // len(self.experiment.seeds)
        rows = []
        for matrix in matrices:
            found = metrics.estimates(matrix, self.agent.score.maximise)
            row: dict[str, float] = {"orders": orders} if orders > 1 else {}
            for name, figure in names.items():
                row |= {name: found[figure].mean, f"{name}_low": found[figure].low, f"{name}_high": found[figure].high}
            rows.append(row)
        return rows

    # ------------------------------------------------------------------ files

    def begin_folder(self) -> None:
        """Write what the run is into its folder, which it holds, for all that follows.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is not None and self.held is not None:
            run_folder.clear(self.folder)
            self.held.sign(self.id)
            about = {"run": self.id} | ({"init": self.begun_from} if self.begun_from else {})
            self.config_digest = run_folder.write_config(self.folder, {**about, **self.experiment.config()})

    def save(self, about: dict[str, Any]) -> None:
        """Write the state into the folder, atomically.

        Raises:
            CheckpointError: the disk is full or failing, or the folder is not that of this run any more.
        """
        if self.folder is not None:
            self._check_held()
            about = {**about, "run": self.id, "config": self.config_digest}
            if self.extended_to:
                about["extended_to"] = self.extended_to
            checkpoint.save(self.folder / run_folder.STATE, self.state, about, learner_axes=1)

    def _check_held(self) -> None:
        if self.held is not None:
            self.held.check()

    def write_summary(self) -> None:
        """Write the final evaluation into the folder.

        Raises:
            CheckpointError: it cannot be written, or the folder is not that of this run any more.
        """
        if self.folder is not None and self.evaluation is not None:
            self._check_held()
            content = {
                "run": self.id,
                "summary": self.summary(),
                "returns": self.evaluation.returns.tolist(),
                "lengths": self.evaluation.lengths.tolist(),
                "stopped": self.stopped,
            }
            run_folder.write_summary(self.folder, content)

    def close(self) -> None:
        """End worker processes and environments, and write no more."""
        self.held = None
        self.world.close()


@undisturbed()
def load(
    folder: str | Path,
    *,
    agent: type | None = None,
    network: NetworkFactory | None = None,
    env: Any = None,
    lifelong: Sequence[Method] = (),
    own: Mapping[str, Any] | None = None,
) -> Run:
    """Read a run back to look at it, act with it or evaluate it: its settings, its state, its final evaluation.

    What only training needs, demonstrations and rewards, is not asked for; `resume` does.

    Args:
        folder: as given to `train(out=...)`.
        agent: the class of the user's own agent's settings again, where it had one; a run folder names code but never
            loads any.
        network: the user's network again, where it had one.
        env: the user's environment factory again, where it had one.
        lifelong: the lifelong methods again, where it had some of your own.
        own: other settings that are code or data, by name, again, where it had some that acting needs.

    Raises:
        CheckpointError: no run there, or a file that is truncated, corrupted or of another agent.
        SettingError: the user's own code or data were not given again, or are others than the run began with.
    """
    return read(folder, agent=agent, network=network, env=env, lifelong=lifelong, own=own, training=False)


def read(
    folder: str | Path,
    *,
    agent: type | None,
    network: NetworkFactory | None,
    env: Any,
    lifelong: Sequence[Method],
    own: Mapping[str, Any] | None,
    training: bool,
    steps: int = 0,
) -> Run:
    """What `load` gives, with all that `training` needs where it goes on, to `steps` if they are given; the other
    arguments and errors are load's."""
    folder = Path(folder)
    if not os.path.lexists(folder / run_folder.CONFIG):
        raise CheckpointError(f"{folder} is not the folder of a run: it has no {run_folder.CONFIG}")
    run_folder.check_plain(folder)
    state, about = _saved(folder)
    if training:
        for name, mark in about["offsets"].items():
            check_start(folder / f"{name}.jsonl", mark)
    config = run_folder.read_config(folder)
    experiment = from_config(
        config,
        where=str(folder),
        agent=agent,
        network=network,
        source=env,
        methods=tuple(lifelong),
        own=own,
        training=training,
    )
    longer = steps or about["extended_to"]
    with within_memory(str(folder)):
        run = Run(extension.extended(experiment, longer) if longer else experiment, folder)
    run.extended_to = longer
    if steps:
        run.old_end = math.ceil((about["extended_to"] or experiment.budget.steps) / run.every)
    try:
        run.id, run.config_digest = about["run"], about["config"]
        run.seconds, run.stopped, run.offsets = float(about["seconds"]), about["stopped"], about["offsets"]
        with within_memory(str(folder)):
            run.start()
        run.state = fit(run.state, state, str(folder))
        run.evaluation = _final_evaluation(folder, run.id, len(experiment.learners))
    except BaseException:
        run.close()
        raise
    return run


def _saved(folder: Path) -> tuple[State, dict[str, Any]]:
    """The newest checkpoint of a run, and what it says, once it is sure that it is of this very run.

    Raises:
        CheckpointError: there is none, it is damaged or of another run, or config.toml was changed since the run began.
    """
    config, where = folder / run_folder.CONFIG, folder / run_folder.STATE
    if not checkpoint.is_saved(where):
        raise CheckpointError(
            f"{folder} holds no checkpoint, its run did not come to the first one: train it again with the same --out"
        )
    state, said = checkpoint.load(where)
    about = dict(said)
    try:
        seconds, stopped, offsets, run, digest = (said[name] for name in SAID)
        if type(seconds) not in (int, float) or not math.isfinite(seconds) or not isinstance(stopped, str):
            raise ValueError(f"seconds {seconds!r}, stopped {stopped!r}")
        if set(offsets) != set(NAMES):
            raise ValueError(f"records {offsets!r}")
        about["offsets"] = {name: Mark.of(mark) for name, mark in offsets.items()}
        about["extended_to"] = said.get("extended_to", 0)
        if type(about["extended_to"]) is not int or about["extended_to"] < 0:
            raise ValueError(f"extended_to {about['extended_to']!r}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"what the checkpoint in {where} says of itself is not of a run ({error!r}): restore it from a copy"
        ) from error
    if digest != run_folder.config_digest(folder):
        raise CheckpointError(
            f"{config} is not the one the run began with: restore it from a copy, or train another run with the change"
        )
    if run != run_folder.run_id(run_folder.read_config(folder), folder):
        raise CheckpointError(f"the checkpoint in {where} is of another run than {config}: restore both from one copy")
    return state, about


def _final_evaluation(folder: Path, run: str, learners: int) -> Evaluation | None:
    """What a run's summary says of its final evaluation; None where the run has not ended.

    Raises:
        CheckpointError: it is damaged.
    """
    content = run_folder.read_summary(folder, run)
    if content is None:
        return None
    try:
        returns = torch.tensor(content["returns"], dtype=torch.float64, device="cpu")
        lengths = torch.tensor(content["lengths"], dtype=torch.int64, device="cpu")
        if returns.dim() != 2 or len(returns) != learners or not returns.shape[1] or lengths.shape != returns.shape:
            raise ValueError(
                f"returns {tuple(returns.shape)} and lengths {tuple(lengths.shape)} of {learners} learners"
            )
        return Evaluation(returns, lengths)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise run_folder.damaged_summary(folder, error) from error


def fit(fresh: State, saved: State, where: str) -> State:
    """The saved state, after a check that it is one of this agent on this task.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or type than the agent's.
    """
    expected, given = tree.flatten(fresh), tree.flatten(saved)
    for name in expected.keys() - given.keys():
        _check_frozen(name, given, where)
    for name, leaf in expected.items():
        if name not in given:
            raise CheckpointError(f"{where}: the checkpoint lacks {name!r}: it is of another agent, task or version")
        if given[name].shape != leaf.shape or given[name].dtype != leaf.dtype:
            raise CheckpointError(
                f"{where}: {name!r} is {given[name].dtype} {tuple(given[name].shape)} in the checkpoint, the agent has "
                f"{leaf.dtype} {tuple(leaf.shape)}: it is of another agent, task or number of learners"
            )
    key = fresh["key"]
    loaded: State = tree.map(lambda leaf: leaf.to(key.device), saved)
    # packed as in the run that goes on: the bits of a matrix product depend on where its factors begin
    loaded["params"]["weights"] = Packed.of(loaded["params"]["weights"], key.dim())
    return loaded


def _check_frozen(name: str, given: dict[str, Tensor], where: str) -> None:
    """Say so where a parameter is missing because it was frozen in the run and is not now, or the reverse."""
    was = {"params/weights/": "frozen", "params/buffers/": "trained"}
    for (group, state), (other, now) in zip(was.items(), reversed(list(was.items()))):
        if name.startswith(group) and name.replace(group, other, 1) in given:
            raise CheckpointError(
                f"{where}: {name.removeprefix(group)} was {state} in the run and is {now} in the network given now: "
                "freeze (requires_grad=False) what was frozen, and nothing else"
            )


def told(initial: tree.Tree, memory: tree.Tree, reward: Any) -> tree.Tree:
    """A memory that an agent acts with within an episode, once it was told the reward of its last action.

    Args:
        initial: its memory at the start of an episode.
        memory: as `run.act` returned it.
        reward: of the last action, where the agent sees rewards.

    Raises:
        SettingError: it is the memory of another agent or of another number of environments, or the reward is missing.
    """
    layouts = [{name: leaf.shape for name, leaf in tree.flatten(each).items()} for each in (initial, memory)]
    require(
        layouts[0] == layouts[1],
        "the memory to act with is not what run.act returned for as many observations of this agent: "
        "leave it out at the start of an episode" + ("" if initial else "; this agent has none"),
    )
    sees = LAST_REWARD in initial
    require(
        sees or reward is None, "a reward is given, which this agent does not see: leave it out, or train with sees"
    )
    if not sees:
        return memory
    require(reward is not None, "the agent sees its last reward: give run.act(observation, memory, reward)")
    before = memory[LAST_REWARD]
    return {**memory, LAST_REWARD: torch.as_tensor(reward, dtype=before.dtype, device=before.device).expand_as(before)}


def per_learner(values: Tensor) -> list[float]:
    """`[S]` as a list for JSON."""
    return np.asarray(values.detach().cpu(), dtype=np.float64).tolist()

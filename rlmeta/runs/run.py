"""Run: experiment, state and evaluation of training, and how it is saved to and loaded from its folder."""

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
from rlmeta.learning import prediction
from rlmeta.learning.collect import LAST_REWARD
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.learner import Learner
from rlmeta.learning.method import Method
from rlmeta.learning.populations import begin as begin_population
from rlmeta.learning.settings import require
from rlmeta.learning.state import State, select
from rlmeta.lifelong import metrics
from rlmeta.runs import budgets, checkpoint, extension, populations, stages
from rlmeta.runs import folder as run_folder
from rlmeta.runs.allocator import keep_freed_memory
from rlmeta.runs.configuration import from_config, within_memory
from rlmeta.runs.experiment import Experiment
from rlmeta.runs.metric_log import NAMES, Mark, check_start
from rlmeta.runs.module import TrainedModule, names_of
from rlmeta.runs.stages import Stage
from rlmeta.runs.surroundings import undisturbed

METADATA = ("seconds", "stopped", "offsets", "run", "config")
"""Required entries of a checkpoint's metadata."""


class Run:
    """A training run: an experiment with its learners' state, and the final evaluation once it has ended.

    Attributes:
        experiment: settings, seeds, problem, and the budget with its defaults filled in.
        agent: the learner, bound to the problem's spaces.
        world: the environments (or samples) of all learners.
        iterations: number of training iterations on every task.
        state: everything that changes in training; tensors `[S, ...]` over the S learners.
        folder: where it is saved, or None.
        evaluation: evaluation of the final parameters, or None while the run has not ended.
        seconds: wall time of training, over all resumes.
        stopped: why it ended before its budget, or ''.
        offsets: position of each metric log at the checkpoint that was loaded.
        id: unique id of the run.
        config_digest: sha256 of `config.toml`, once that is written.
        held: the lock on the folder, while this process writes it.
        begun_from: folder of the run whose weights it was initialised with, or ''.
        extended_to: steps of an extended budget, 0 if it is the one in config.toml.
        previous_end: iteration at which the run ended before it was extended, while the evaluation that a longer run
            makes there is still to be made, else 0.
    """

    def __init__(self, experiment: Experiment, folder: Path | None) -> None:
        self.folder = None if folder is None else folder.absolute()  # an environment may change the current folder
        self.id, self.config_digest = secrets.token_hex(8), ""
        self.held: run_folder.Hold | None = None
        experiment.use_threads()
        keep_freed_memory()
        self.world = experiment.world()
        try:
            self.agent: Learner = experiment.bind(self.world)
            self.iterations = budgets.iterations_of(experiment.problem, self.agent, self.world, experiment.budget)
            budget = budgets.settled(
                experiment.budget, experiment.problem, self.world, self.iterations, self.env_steps_per_iteration
            )
        except BaseException:
            self.world.close()
            raise
        self.experiment = dataclasses.replace(experiment, budget=budget)
        self.state: State = {}
        self.evaluation: Evaluation | None = None
        self.seconds = 0.0
        self.stopped = ""
        self.offsets: dict[str, Mark] = {}
        self.extended_to = self.previous_end = 0
        self.begun_from = ""
        self._actions = 0

    @property
    def env_steps_per_iteration(self) -> int:
        """Environment steps (or samples) of each learner in one iteration, as the budget counts them."""
        steps: int = self.world.num_envs * self.agent.steps_per_iteration
        return steps

    def start(self) -> None:
        """Initialise the state: parameters, optimizers, environments.

        Raises:
            SettingError, HookError: settings, problem or methods do not work together.
        """
        _ = self.stages
        self.state = self.agent.init(self.experiment.keys(), self.experiment.hyper(), self.world)
        if self.stream is not None:
            self.state = stages.start(self.state, self.stream)
        if self.experiment.population is not None:
            self.state = begin_population(self.state)

    @property
    def stages(self) -> list[Stage]:
        """Stages of training: a single one, or the phases of every task of a stream."""
        return stages.stages_of(self.experiment.problem, self.agent.methods, self.iterations)

    @property
    def stream(self) -> TaskStream | None:
        """The stream of tasks, or None for a single problem."""
        problem = self.experiment.problem
        return problem if isinstance(problem, TaskStream) else None

    @property
    def matrix(self) -> Tensor:
        """Score matrix of a stream, `[S, T + 1, T]`: row i has the scores on all tasks after training on the first i.

        Columns follow each learner's own task order; NaN where nothing was evaluated yet.

        Raises:
            SettingError: the run is not on a stream.
        """
        if self.stream is None:
            raise SettingError(f"{self.experiment.problem.name} is a single problem: only a stream has a matrix")
        matrix: Tensor = self.state["matrix"]
        return matrix

    # ------------------------------------------------------------------ evaluation, actions, predictions

    @property
    def iterations_done(self) -> int:
        """Iterations trained so far (the most of any learner, as some may have stopped)."""
        return int(self.state["count"]["iterations"].max())

    @property
    def env_steps(self) -> int:
        """Environment steps of each learner so far (the most of any, as some may have stopped)."""
        return int(self.state["count"]["env_steps"].max())

    @property
    def scores(self) -> Tensor:
        """Mean score of every learner's final evaluation, `[S]`.

        On a stream the mean over its tasks, each with equal weight however many samples or classes it has;
        `lifelong.metrics.accuracy(run.matrix, run.evaluation.lengths)` weights every test sample equally.

        Raises:
            SettingError: there was no final evaluation yet.
        """
        if self.evaluation is None:
            raise SettingError("the run has not ended: `rlmeta resume` it, or call run.evaluate()")
        return self.evaluation.returns.mean(-1)

    @undisturbed()
    def evaluate(self, episodes: int, *, deterministic: bool = True, best: bool = False, seed: int = 0) -> Evaluation:
        """Evaluate every learner on new episodes; on a stream, on every task in turn.

        Args:
            episodes: episodes of each learner, and of every task.
            deterministic: take the policy's mode instead of sampling actions.
            best: use the parameters of each learner's best periodic evaluation instead of the final ones.
            seed: seed of the episodes.

        Returns:
            Returns and lengths, `[S, episodes]` each; on a stream `[S, T * episodes]`, task by task.
        """
        state = self.best_state() if best else self.state
        world = self.evaluation_world(episodes)
        try:
            key = random.fold(random.fold(state["key"], "evaluation"), seed)
            if self.stream is None:
                p = self.agent.effective_params(state)
                return self.agent.evaluate(p, world, key, episodes, deterministic=deterministic)
            orders = self.experiment.orders
            evaluations = stages.evaluate_tasks(
                self.agent, state, world, self.stream, orders, key, episodes, deterministic=deterministic
            )
            return Evaluation(*(torch.cat(parts, -1) for parts in zip(*evaluations)))
        finally:
            world.close()

    def best_state(self) -> State:
        """State with the parameters of every learner's best periodic evaluation (early stopping).

        A learner that never had a finite score keeps its final parameters.

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
        """Create environments for an evaluation of `episodes` episodes."""
        rows = self.agent.evaluation_rows(episodes, self.experiment.problem.native)
        return self.experiment.evaluation_world(rows)

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
        """Choose an action for an observation, ready for `env.step`, or actions for a batch of observations.

        Args:
            observation: an observation of the environment, or a batch `[B, ...]` of a vector environment.
            memory: recurrent state of the agent, as the previous call returned it; None at the start of an episode.
            reward: the last reward, a number or `[B]`, for agents that observe their rewards.
            deterministic: take the policy's mode instead of sampling an action.
            learner: the learner's index; by default the best in the final evaluation.

        Returns:
            The action, or actions `[B, ...]`; of a recurrent agent the pair (action, memory).

        Raises:
            SettingError: no such learner, no learner has a finite score, or a memory or reward is missing or unused.
            SpaceError: the observation is not in the task's observation space.
        """
        if not self.agent.acts:
            raise SettingError(f"a run of {self.experiment.agent_name} does not act: run.module() predicts")
        learner, state = self.chosen_learner(learner), self.state
        p = tree.map(lambda leaf: leaf[learner], self.agent.effective_params(state))
        batch = spaces.batch_size(self.world.observation_space, observation)
        rows = () if batch is None else (batch,)
        observed = spaces.to_tree(self.world.observation_space, observation, rows, "the caller")
        if any(bool(leaf.isnan().any()) for leaf in tree.leaves(observed) if leaf.is_floating_point()):
            raise SpaceError("the observation to act on holds NaN")
        if batch is None:
            observed = tree.map(lambda x: x.unsqueeze(0), observed)
        self._actions += 1
        key = random.fold(random.fold(state["key"][learner], "act"), self._actions)
        agent: Any = self.agent
        initial = agent.initial_memory(p, (batch or 1,))
        memory_in = initial if memory is None else with_reward(initial, memory, reward)
        action, memory_out = agent.act(p, observed, memory_in, key, deterministic)
        action = spaces.to_numpy(self.world.action_space, action[0] if batch is None else action, rows)
        return (action, memory_out) if initial else action

    @undisturbed()
    def predict(
        self, support: Any, query: Any, *, steps: int | None = None, learner: int | None = None, best: bool = False
    ) -> Tensor:
        """Predict with a meta-learner: adapt to a task's support set, then predict targets for its query set.

        Args:
            support: (inputs `[n, ...]`, targets `[n, ...]`) of a task, arrays or tensors; or of K tasks at once,
                `[K, n, ...]` each.
            query: inputs `[B, ...]`, or `[K, B, ...]`.
            steps: number of inner steps; by default as in training. A prototypical network takes none.
            learner: the learner's index; by default the best in the final evaluation.
            best: use the parameters of its best periodic evaluation instead of the final ones.

        Returns:
            Predictions `[B, D]`, or class probabilities `[B, ways]`; with K tasks `[K, B, ...]`.

        Raises:
            SettingError: the run's learner is not a meta-learner on support sets; support and query do not fit
                together; a class has no sample; steps is no whole number from 0 on.
            SpaceError: inputs or targets have another shape or type than the tasks', or are whole numbers outside of
                their bounds, such as bytes of a picture for 0 to 1; floats outside of them are used with a warning.
        """
        agent: Any = self.agent
        if not agent.answers:
            raise SettingError(
                f"a run of {self.experiment.agent_name} does not predict from a support set: give one of MAML or "
                "ProtoNet"
            )
        chosen, state = self.chosen_learner(learner), self.best_state() if best else self.state
        device, spaces_ = state["key"].device, (self.world.observation_space, self.world.action_space)
        support_batch, query_batch, several = prediction.to_batches(*spaces_, support, query, device)
        p = tree.map(lambda leaf: leaf[chosen], agent.effective_params(state))
        predictions: Tensor = agent.answer(p, support_batch, query_batch, steps)
        predictions = predictions.softmax(-1) if agent.classes else predictions
        return predictions if several else predictions[0]

    def module(self, learner: int | None = None, name: str | None = None, *, best: bool = False) -> TrainedModule:
        """Export a trained policy or network of one learner as an `nn.Module` on batches of observations `[B, ...]`.

        Of what acts it gives the actions for `env.step` that `run.act(..., deterministic=True)` gives; of what predicts
        its predictions. It can be called, saved by `torch.save`, and exported by `torch.export` or to ONNX.

        Args:
            learner: the learner's index; by default the best in the final evaluation.
            name: "action", the default of what acts; or one of the learner's networks ("policy", "value", "q", "net")
                for its own outputs: logits, action values, or a distribution's parameters, which are no actions: a
                mean before the tanh or the scaling to the actions' bounds. Of MAML it is the inner learner's, with the
                meta-learned initial weights.
            best: use the parameters of its best periodic evaluation instead of the final ones.

        Raises:
            SettingError, UnknownNameError: no such learner or network.
        """
        agent: Any = self.agent
        inner = getattr(agent, "inner", agent)
        chosen, state = self.chosen_learner(learner), self.best_state() if best else self.state
        p = tree.map(lambda leaf: leaf[chosen], self.agent.effective_params(state))
        return TrainedModule(inner, p, name or names_of(inner)[0]).eval()

    def chosen_learner(self, learner: int | None) -> int:
        """Validate a learner's index; None is the best in the final evaluation, or the first before there is one.

        Raises:
            SettingError: there is no such learner, or no learner has a finite score.
        """
        if learner is None:
            return self.best_learner if self.evaluation is not None else 0
        if not 0 <= learner < len(self.experiment.learners):
            raise SettingError(f"learner {learner}: the run has learners 0 to {len(self.experiment.learners) - 1}")
        return learner

    @property
    def best_learner(self) -> int:
        """Index of the learner with the best final score.

        Raises:
            SettingError: no learner has a finite score.
        """
        return self.agent.score.best(self.scores)

    def summary(self) -> list[dict[str, Any]]:
        """Results, a row for each variant: label, IQM with 95 % interval, mean, steps, seconds, steps/s."""
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
                    "scores": [float(value) for value in score],
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
        """Backward transfer, forward transfer and forgetting of every variant on a stream; empty for a single problem.

        Means over its learners with 95 % intervals (`BWT`, `BWT_low`, `BWT_high`, ...), and the number of `orders`.
        """
        if self.stream is None:
            return [{} for _ in self.experiment.labels]
        matrices = self.matrix.reshape(-1, self.experiment.repeats, *self.matrix.shape[1:]).cpu().numpy()
        names = {"BWT": "backward_transfer", "FWT": "forward_transfer", "forgetting": "forgetting"}
        orders = self.experiment.repeats // len(self.experiment.seeds)
        rows = []
        for matrix in matrices:
            estimates = metrics.estimates(matrix, self.agent.score.maximise)
            row: dict[str, float] = {"orders": orders} if orders > 1 else {}
            for name, figure in names.items():
                mean, low, high = (getattr(estimates[figure], end) for end in ("mean", "low", "high"))
                row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
        return rows

    # ------------------------------------------------------------------ files

    def begin_folder(self) -> None:
        """Clear the locked folder of a failed start and write `config.toml` into it.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self.folder is not None and self.held is not None:
            run_folder.clear(self.folder)
            self.held.sign(self.id)
            about = {"run": self.id} | ({"init": self.begun_from} if self.begun_from else {})
            self.config_digest = run_folder.write_config(self.folder, {**about, **self.experiment.config()})

    def save(self, about: dict[str, Any]) -> None:
        """Save a checkpoint of the state into the folder, atomically; a run in memory saves nothing.

        Args:
            about: metadata, to which the run's id and configuration digest are added.

        Raises:
            CheckpointError: the disk is full or failing, or the folder is not this run's any more.
        """
        if self.folder is not None:
            self._check_held()
            about = {**about, "run": self.id, "config": self.config_digest}
            if self.extended_to:
                about |= {"extended_to": self.extended_to, "previous_end": self.previous_end}
            checkpoint.save(self.folder / run_folder.STATE, self.state, about, learner_axes=1)

    def _check_held(self) -> None:
        if self.held is not None:
            self.held.check()

    def write_summary(self) -> None:
        """Write the final evaluation into the folder, as `summary.json`.

        Raises:
            CheckpointError: it cannot be written, or the folder is not this run's any more.
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
        """Close the environments and their worker processes; the folder is not written any more."""
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
    """Load a run from its folder, to inspect it, act with it or evaluate it.

    Demonstrations and rewards, which only training needs, are not required. Args and errors are those of
    `rlmeta.api.load`; user code is given as objects.
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
    """Load a run; arguments and errors are those of `load`, and two more.

    Args:
        training: also read what only training needs, and check the metric logs, for a resume.
        steps: extend the budget to this many steps; 0 keeps it.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / run_folder.CONFIG):
        raise CheckpointError(f"{folder} is not the folder of a run: it has no {run_folder.CONFIG}")
    run_folder.check_plain(folder)
    state, about = _saved(folder)
    if training:
        for name, mark in about["offsets"].items():
            check_start(folder / f"{name}.jsonl", mark)
    experiment = from_config(
        run_folder.read_config(folder),
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
    run.extended_to, run.previous_end = longer, about["previous_end"]
    try:
        run.id, run.config_digest = about["run"], about["config"]
        run.seconds, run.stopped, run.offsets = float(about["seconds"]), about["stopped"], about["offsets"]
        with within_memory(str(folder)):
            run.start()
        run.state = match_checkpoint(run.state, state, str(folder), own_network=network is not None)
        if steps and run.iterations_done == _last_iteration(run, about["extended_to"] or experiment.budget.steps):
            run.previous_end = run.iterations_done
        run.evaluation = _final_evaluation(folder, run.id, len(experiment.learners))
    except BaseException:
        run.close()
        raise
    return run


def _last_iteration(run: Run, steps: int) -> int:
    """The iteration at which a budget of `steps` ends."""
    return math.ceil(steps / run.env_steps_per_iteration)


def _saved(folder: Path) -> tuple[State, dict[str, Any]]:
    """Load the newest checkpoint of a run: its state and metadata, validated.

    Raises:
        CheckpointError: there is none, it is damaged or of another run, or config.toml was changed since the run began.
    """
    config, where = folder / run_folder.CONFIG, folder / run_folder.STATE
    if not checkpoint.is_saved(where):
        raise CheckpointError(
            f"{folder} holds no checkpoint, its run ended before the first one: train it again with the same --out"
        )
    state, saved = checkpoint.load(where)
    about = dict(saved)
    try:
        seconds, stopped, offsets, run, digest = (saved[name] for name in METADATA)
        if type(seconds) not in (int, float) or not math.isfinite(seconds) or not isinstance(stopped, str):
            raise ValueError(f"seconds {seconds!r}, stopped {stopped!r}")
        if set(offsets) != set(NAMES):
            raise ValueError(f"metric logs {offsets!r}")
        about["offsets"] = {name: Mark.of(mark) for name, mark in offsets.items()}
        for name in ("extended_to", "previous_end"):
            about[name] = saved.get(name, 0)
            if type(about[name]) is not int or about[name] < 0:
                raise ValueError(f"{name} {about[name]!r}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"the metadata of the checkpoint in {where} is not of a run ({error!r}): restore it from a copy"
        ) from error
    if digest != run_folder.config_digest(folder):
        raise CheckpointError(
            f"{config} is not the one the run began with: restore it from a copy, or train another run with the change"
        )
    if run != run_folder.run_id(run_folder.read_config(folder), folder):
        raise CheckpointError(f"the checkpoint in {where} is of another run than {config}: restore both from one copy")
    return state, about


def _final_evaluation(folder: Path, run: str, learners: int) -> Evaluation | None:
    """Read the final evaluation from a run's summary; None if the run has not ended.

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


def match_checkpoint(fresh: State, saved: State, where: str, own_network: bool = False) -> State:
    """Check names, shapes and dtypes of a loaded checkpoint's tensors, and move them to the run's device.

    Args:
        fresh: the run's initial state, with the expected names, shapes and dtypes.
        saved: the loaded state.
        where: the run's folder, for error messages.
        own_network: whether the network is the user's, given again, which may be another one.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype than the agent's.
    """
    hint = "it is of another agent, task or number of learners"
    hint = "network= is not the network that the run was trained with, give the same" if own_network else hint
    expected, leaves = tree.flatten(fresh), tree.flatten(saved)
    for name in expected.keys() - leaves.keys():
        _check_frozen(name, leaves, where)
    for name, leaf in expected.items():
        if name not in leaves:
            raise CheckpointError(f"{where}: the checkpoint lacks {name!r}: {hint}")
        value = leaves[name]
        if value.shape != leaf.shape or value.dtype != leaf.dtype:
            raise CheckpointError(
                f"{where}: {name!r} is {value.dtype} {tuple(value.shape)} in the checkpoint, the agent has "
                f"{leaf.dtype} {tuple(leaf.shape)}: {hint}"
            )
    key = fresh["key"]
    loaded: State = tree.map(lambda leaf: leaf.to(key.device), saved)
    # packed as in training: the bits of a matrix product depend on the alignment of its factors
    loaded["params"]["weights"] = Packed.of(loaded["params"]["weights"], key.dim())
    return loaded


def _check_frozen(name: str, leaves: dict[str, Tensor], where: str) -> None:
    """Refuse a checkpoint if a missing parameter was frozen (`requires_grad=False`) and is not now, or the reverse."""
    was = {"params/weights/": "frozen", "params/buffers/": "trained"}
    for (group, state), (other, now) in zip(was.items(), reversed(list(was.items()))):
        if name.startswith(group) and name.replace(group, other, 1) in leaves:
            raise CheckpointError(
                f"{where}: {name.removeprefix(group)} was {state} in the run and is {now} in the network given now: "
                "freeze (requires_grad=False) what was frozen, and nothing else"
            )


def with_reward(initial: tree.Tree, memory: tree.Tree, reward: Any) -> tree.Tree:
    """Add the last reward to an agent's recurrent state, if the agent observes rewards.

    Args:
        initial: the recurrent state at the start of an episode.
        memory: the recurrent state that `run.act` returned.
        reward: the last action's reward, or None if the agent does not observe rewards.

    Raises:
        SettingError: the memory is of another agent or number of environments, or the reward is missing or unused.
    """
    layouts = [{name: leaf.shape for name, leaf in tree.flatten(each).items()} for each in (initial, memory)]
    require(
        layouts[0] == layouts[1],
        "the memory is not one that run.act returned for this agent and this number of observations: "
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
    """Convert a tensor `[S]` to a list for JSON."""
    return np.asarray(values.detach().cpu(), dtype=np.float64).tolist()

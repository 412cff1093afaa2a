"""The training loop: iterate, log metrics, evaluate, save checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from rlmeta.engine.clock import clock
from rlmeta.envs.families import FamilyWorld
from rlmeta.envs.streams import TaskStream
from rlmeta.functional import random, tree
from rlmeta.learning.learner import Metrics
from rlmeta.learning.state import select
from rlmeta.runs import averages, budgets, extension, populations, stages
from rlmeta.runs.frozen import FrozenLearners
from rlmeta.runs.listeners import Listener
from rlmeta.runs.metric_log import MetricLog
from rlmeta.runs.run import Run, per_learner
from rlmeta.runs.signals import Interruption
from rlmeta.runs.stages import Stage

Callback = Callable[[Run, dict[str, Any]], bool | None]
"""Called with the run and each entry of its metric log; returning True stops the run."""


class Loop:
    """Training loop of a run: until the budget is spent, no learner is active, a callback returns True, or Ctrl-C.

    Args:
        run: the run to train; its state is replaced as training proceeds.
        callbacks: functions of (run, metrics) that may stop it.
        listeners: event hooks, such as progress and trackers.
    """

    def __init__(self, run: Run, callbacks: Sequence[Callback] = (), listeners: Sequence[Listener] = ()) -> None:
        self.run, self.callbacks, self.listeners = run, callbacks, listeners
        self.budget = run.experiment.budget
        self.steps_per_iteration = run.env_steps_per_iteration
        self.stages = run.stages
        self.iterations = self.stages[-1].last
        self.log_every = max(1, self.iterations // self.budget.log_points)
        self.eval_every, self.exchange_every = budgets.periods(
            self.budget, run.experiment.population, self.iterations, self.steps_per_iteration
        )
        self.iteration = self._begun_at = run.iterations_done
        self.interruption = Interruption()
        self.frozen = FrozenLearners(run.experiment.problem.native)
        self._started = self._saved = time.perf_counter()
        self._seconds_before_resume = run.seconds
        self.frozen.hold(self.run.state)
        self.eval_world: Any = None
        self.logs: dict[str, MetricLog] = {}
        with ExitStack() as closing:
            self._open(closing)
            self._exit_stack = closing.pop_all()

    def _open(self, closing: ExitStack) -> None:
        """Open the evaluation environments and the metric logs; `closing` closes them, also when one fails to open."""
        run = self.run
        if min(self.eval_every, self.exchange_every) < self.iterations or run.stream is not None:
            self.eval_world = run.evaluation_world(self.budget.eval_episodes)
            closing.callback(self.eval_world.close)
            if isinstance(self.eval_world, FamilyWorld):
                self.eval_world.split = "validation"
        if run.folder is not None:
            for name in ("metrics", "timing"):
                self.logs[name] = closing.enter_context(MetricLog(run.folder / f"{name}.jsonl"))
            for name, offset in run.offsets.items():
                self.logs[name].truncate(offset)

    @property
    def stream(self) -> TaskStream:
        """The run's stream; only for runs on a stream."""
        assert self.run.stream is not None
        return self.run.stream

    # ------------------------------------------------------------------ the loop

    def go(self) -> Run:
        """Train to the end, evaluate, and return the run."""
        run = self.run
        clock.reset()
        self._started, self._seconds_before_resume = time.perf_counter(), run.seconds
        with self.interruption.caught(), self._resources():
            self._evaluate_at_previous_budget()
            while self.iteration < self.iterations and self._active() and not run.stopped and not self.interruption:
                log_entry = self._advance()
                self._count_seconds()
                if log_entry is not None:
                    self._log(log_entry)
                    self._save_if_due()
            self._count_seconds()
            if self.interruption:
                self._save()
            else:
                run.stopped = run.stopped or ("" if self._active() else "every learner has stopped")
                self._finish()
        if self.interruption:
            run.stopped = "interrupted"
        return run

    def _evaluate_at_previous_budget(self) -> None:
        """Evaluate at the end of the previous budget of a run that now gets more steps, where that was skipped."""
        if self._evaluation_is_due() and 0 < self.iteration == self.run.previous_end:
            steps = self.iteration * self.steps_per_iteration
            log_entry = {"iteration": self.iteration, "env_steps": steps, **_lists(self._evaluate_and_exchange())}
            self.run.previous_end = 0
            self._log(log_entry)

    def _evaluation_is_due(self) -> bool:
        """Whether a periodic evaluation is due after this iteration; never on a stream."""
        due = self.iteration % self.eval_every == 0 or self.iteration % self.exchange_every == 0
        return due and self.eval_world is not None and self.run.stream is None and self.iteration < self.iterations

    def _count_seconds(self) -> None:
        self.run.seconds = self._seconds_before_resume + time.perf_counter() - self._started

    def _save_if_due(self) -> None:
        """Save a checkpoint if the last one is `checkpoint_seconds` old."""
        if time.perf_counter() - self._saved >= self.budget.checkpoint_seconds:
            self._count_seconds()
            self._save()

    def _advance(self) -> dict[str, Any] | None:
        """Train up to the next entry of the metric log and return it; None if a signal interrupts."""
        run, before = self.run, self._active_learners()
        stage = next(stage for stage in self.stages if self.iteration < stage.last)
        if run.stream is not None and int(run.state["stage"].max()) == stage.number:
            self._begin(stage)
        last = min(*map(self._next, (self.log_every, self.eval_every, self.exchange_every)), stage.last)
        while self.iteration < last and not self.interruption:
            self._iterate(stage)
            if self.iteration < last:
                self._save_if_due()
        self._warn_of_frozen(before)
        return self._build_log_entry(stage) if self.iteration == last else None

    def _iterate(self, stage: Stage) -> None:
        """One iteration of every learner."""
        run = self.run
        progress = torch.full_like(run.state["progress"], stage.progress(self.iteration))
        run.state["progress"] = progress
        run.state["task"] = {**run.state["task"], "progress": progress}
        # a learner that stops again within this iteration must stay there, not at its first stop
        self.frozen.forget_revived(run.state)
        clock.switch("learn")
        run.state, metrics = run.agent.iterate(run.state, run.world)
        clock.switch("other")
        averages.accumulate(run.state, metrics)
        self.frozen.hold(run.state)
        self.iteration += 1

    def _build_log_entry(self, stage: Stage) -> dict[str, Any]:
        """Build an entry of the metric log: averaged metrics, and the evaluation if one is due."""
        run = self.run
        log_entry: dict[str, Any] = {
            "iteration": self.iteration,
            "env_steps": self.iteration * self.steps_per_iteration,
        }
        if self.iteration % self.log_every == 0 or self.iteration == self.iterations:
            log_entry.update(_lists(averages.take_averages(run.state)))
        if run.stream is not None:
            if stage.ends_task and self.iteration == stage.last:
                log_entry.update(_lists(self._end_task(stage)))
        elif self._evaluation_is_due():
            log_entry.update(_lists(self._evaluate_and_exchange()))
        return log_entry

    def _begin(self, stage: Stage) -> None:
        """Begin a stage of a stream; before the first one, evaluate the untrained learners on all tasks."""
        run = self.run
        run.state = stages.begin(run.agent, run.state, run.world, self.stream, run.experiment.orders, stage)
        if stage.number == 0:
            self._fill_matrix(0)
        self.frozen.hold(self.run.state)

    def _end_task(self, stage: Stage) -> Metrics:
        """Task boundary: let the lifelong methods consolidate, then evaluate on all tasks."""
        run = self.run
        clock.switch("learn")
        if stage.announced:
            run.state = stages.end_task(run.agent, run.state, run.world)
        self.frozen.hold(self.run.state)
        self._fill_matrix(stage.position + 1)
        scores = run.matrix[..., stage.position + 1, :]
        metric = run.agent.score.metric
        defined = [j for j in range(scores.shape[-1]) if not bool(scores[..., j].isnan().all())]
        return {f"{metric}_task_{j}": scores[..., j] for j in defined} | {
            metric: scores[..., : stage.position + 1].mean(-1)
        }

    def _fill_matrix(self, row: int) -> None:
        """Evaluate on all tasks and store the scores in a row of the matrix."""
        clock.switch("evaluate")
        run, orders = self.run, self.run.experiment.orders
        # common random numbers: the same episodes in every row
        key = random.fold(run.state["key"], "stream evaluation")
        scores = stages.score_tasks(
            run.agent, run.state, self.eval_world, self.stream, orders, key, self.budget.eval_episodes
        )
        matrix = run.state["matrix"].clone()
        matrix[..., row, :] = scores
        run.state["matrix"] = matrix
        clock.switch("other")

    def _evaluate_and_exchange(self) -> Metrics:
        """Periodic evaluation, followed by the exchange of a population if that is due."""
        metrics = self._evaluate()
        if self.iteration % self.exchange_every == 0:
            metrics |= populations.exchange(self.run, metrics[self.run.agent.score.metric], self.iteration)
            self.frozen.hold(self.run.state)
        return metrics

    def _evaluate(self) -> Metrics:
        """Periodic evaluation: keep the best parameters, stop learners that reached the target."""
        clock.switch("evaluate")
        state, agent, target = self.run.state, self.run.agent, self.budget.target
        key = random.fold(random.fold(state["key"], "periodic evaluation"), self.iteration)
        p = agent.effective_params(state)
        result = agent.evaluate(p, self.eval_world, key, self.budget.eval_episodes)
        score = result.returns.mean(-1)
        current = {"score": score, "params": {name: dict(p[name]) for name in ("weights", "buffers", "normalisers")}}
        best = state.get("best", current)
        better = agent.score.better(score, best["score"])
        state["best"] = tree.map(torch.clone, select(better & state["active"], current, best))
        state["active"] = state["active"] & ~agent.score.reaches(score, target)
        self.frozen.hold(self.run.state)
        clock.switch("other")
        return {
            agent.score.metric: score,
            "eval/length": result.lengths.double().mean(-1),
        }

    def _active(self) -> bool:
        return any(self._active_learners())

    def _active_learners(self) -> list[bool]:
        return self.run.state["active"].tolist()

    def _warn_of_frozen(self, before: Sequence[bool]) -> None:
        """Warn of learners, active `before`, that turned NaN or infinite, and of non-finite values of environments."""
        names, warn_of_nonfinite = self._names(), getattr(self.run.world, "warn_of_nonfinite", None)
        if warn_of_nonfinite is not None:
            warn_of_nonfinite(self.run.state["world"])
        broken_task = getattr(self.run.agent, "broken_task", None)
        for i, (name, was, active) in enumerate(zip(names, before, self._active_learners())):
            if was and not active:
                task = broken_task(self.run.state, self.run.world, i) if broken_task else ""
                why = f" ({task})" if task else ""
                text = (
                    f"{name} is no longer finite{why}: frozen by iteration {self.iteration}, the other learners go on"
                )
                warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _names(self) -> list[str]:
        """Names of the learners in warnings, from their seeds and labels."""
        experiment = self.run.experiment
        learners = zip(experiment.learner_labels, experiment.learners)
        return [f"seed {seed}" + (f" ({label})" if label else "") for label, (_, seed) in learners]

    def _warn_of_scores(self) -> None:
        """Warn if final scores are not finite, or if no learner has taken a gradient step."""
        run = self.run
        names = [name for name, score in zip(self._names(), run.scores.tolist()) if not math.isfinite(score)]
        if names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            text = f"{len(names)} of {len(run.experiment.learners)} final scores are not finite: {shown}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        if not bool(run.state["count"]["gradient_steps"].any()):
            text = "no learner has taken a gradient step: the scores are those of the initial parameters"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _next(self, every: int) -> int:
        """The next iteration that is a multiple of `every`."""
        return (self.iteration // every + 1) * every

    @contextmanager
    def _resources(self) -> Iterator[None]:
        """Save the first checkpoint and open the listeners; close everything at the end."""
        with self._exit_stack as closing:
            for listener in self.listeners:
                closing.callback(listener.close)
            if self.iteration == 0 or self.run.extended_to:
                self._save()
            for listener in self.listeners:
                listener.open(self.run, self.iteration)
            yield

    # ------------------------------------------------------------------ metric logs and checkpoints

    def _log(self, log_entry: dict[str, Any]) -> None:
        """Append an entry to the metric log, and pass it to listeners and callbacks."""
        if self.logs:
            self.logs["metrics"].write(log_entry)
            rate = log_entry["env_steps"] * len(self.run.experiment.learners) / max(self.run.seconds, 1e-9)
            times = {f"time/{part}": seconds for part, seconds in clock.seconds.items()}
            timing = {"iteration": self.iteration, "seconds": self.run.seconds, "charts/SPS": rate, **times}
            self.logs["timing"].write(timing)
        for listener in self.listeners:
            listener.log(self.run, self.iteration, log_entry)
        for callback in self.callbacks:
            if callback(self.run, log_entry):
                self.run.stopped = "a callback stopped it"

    def _finish(self) -> None:
        """Save, run the final evaluation and write the summary; if interrupted, a resume does the evaluation."""
        self._save()
        try:
            with self.interruption.at_once():
                if self.interruption:
                    return
                clock.switch("evaluate")
                self.run.evaluation = self.run.evaluate(self.budget.final_episodes)
                clock.switch("other")
        except KeyboardInterrupt:
            if not self.interruption:
                raise
            return
        self._warn_of_scores()
        self.run.write_summary()
        for listener in self.listeners:
            listener.finish(self.run)

    def _save(self) -> None:
        run = self.run
        about = {
            "agent": run.experiment.agent_name,
            "task": run.experiment.problem.name,
            "iteration": self.iteration,
            "offsets": {name: log.mark() for name, log in self.logs.items()},
            "seconds": run.seconds,
            "stopped": run.stopped,
            "torch": torch.__version__,
        }
        run.save(about)
        if self.iteration > self._begun_at or self.iteration < self.iterations:
            extension.discard_summary(run)
        self._saved = time.perf_counter()


def _lists(metrics: Metrics) -> dict[str, list[float]]:
    """Convert metrics `[*L]` to lists for JSON."""
    return {name: per_learner(value) for name, value in metrics.items()}

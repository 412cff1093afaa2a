"""Classification by maximum likelihood, over the classes of a task, of all tasks so far, or of a domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.data.samples import DataWorld
from rlmeta.functional import losses, tree
from rlmeta.learning.evaluate import Evaluation
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.learner import Score
from rlmeta.learning.method import Method
from rlmeta.learning.state import Params, State
from rlmeta.nn import Context, Distribution
from rlmeta.supervised.learner import Supervised, SupervisedSettings, require_target


@dataclass(frozen=True)
class Classifier(SupervisedSettings):
    """Settings of a classifier. A list for a number marked per learner compares its values."""

    hidden_sizes: tuple[int, ...] = (400, 400)
    """Widths of the hidden layers of the default network."""

    def bind(
        self, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> ClassifierLearner:
        """Create the classifier for an input and a target space."""
        return ClassifierLearner(self, observation_space, target_space, methods)


class ClassifierLearner(Supervised):
    """Classifier. In a stream, only known classes, those of tasks so far, can be predicted."""

    score = Score("accuracy")

    def __init__(
        self, settings: Any, observation_space: gym.Space, target_space: gym.Space, methods: Sequence[Method] = ()
    ) -> None:
        require_target(target_space, gym.spaces.Discrete, "Classifier", "Regressor")
        self.classes = int(target_space.n)  # type: ignore[attr-defined]
        super().__init__(settings, observation_space, target_space, methods)

    def outputs(self) -> int:
        """Number of outputs: a logit per class."""
        return self.classes

    def init(self, key: Tensor, hyper: dict[str, Tensor], world: DataWorld) -> State:
        """Initial state of a run, with the classes that are known from the beginning."""
        state = super().init(key, hyper, world)
        state["params"]["buffers"]["known_classes"] = world.initial_classes().expand(*key.shape, -1).clone()
        return state

    def begin_task(self, state: State, world: DataWorld, key: Tensor) -> State:
        """Begin the world's task; if it is announced, its classes become known."""
        state = super().begin_task(state, world, key)
        return _add_classes(state, world.classes()) if world.announces else state

    def meet(self, state: State, world: DataWorld, batch: tree.Tree) -> State:
        """Add the classes of a minibatch to the known ones, if tasks are not announced."""
        if world.announces or world.scenario != "class":
            return state
        met = torch.zeros_like(state["params"]["buffers"]["known_classes"])
        return _add_classes(state, met.scatter(-1, batch["target"], torch.ones_like(batch["target"], dtype=torch.bool)))

    def logits(self, p: Params, batch: tree.Tree, ctx: Context | None = None) -> Tensor:
        """Logits of every class, `[*L, B, C]`.

        They are minus infinity for classes that are not known yet, and for those that `allowed` `[*L, B, C]` of the
        batch excludes because the task is known.
        """
        output = self.output(p, batch, ctx)
        open_ = p["buffers"]["known_classes"].unsqueeze(-2) if "known_classes" in p["buffers"] else None
        if "allowed" in batch:
            open_ = batch["allowed"] if open_ is None else batch["allowed"] & open_
        return output if open_ is None else output.masked_fill(~open_, -torch.inf)

    def distribution(self, p: Params, batch: tree.Tree, ctx: Context) -> Distribution:
        """Predictive distribution: `logits` of every class, `[*L, B, C]`."""
        return {"logits": self.logits(p, batch, ctx)}

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Cross-entropy loss in nats, `[*L]`."""
        logits = self.logits(p, batch, ctx)
        if ctx.report:
            with torch.no_grad():
                ctx.info["losses/accuracy"] = self.score_of(logits, batch).mean(-1)
        loss = losses.cross_entropy_loss(logits, batch["target"], batch.get("valid"))
        ctx.info["losses/loss"] = loss.detach()
        return {"net": loss}

    def evaluate(
        self, p: Params, world: DataWorld, key: Tensor, episodes: int = 1, *, deterministic: bool = True
    ) -> Evaluation:
        """Accuracy on all test samples of the world's task, `[*L, 1]`; NaN while a class of it is not known yet."""
        evaluation = super().evaluate(p, world, key, episodes, deterministic=deterministic)
        has_unknown = (world.classes().to(key.device) & ~p["buffers"]["known_classes"]).any(-1, keepdim=True)
        return evaluation._replace(returns=evaluation.returns.masked_fill(has_unknown, torch.nan))

    def log_prob(self, p: Params, batch: tree.Tree) -> Tensor:
        """Log-probability of the targets, `[*L, B]`."""
        logits = self.logits(p, batch).log_softmax(-1)
        return logits.gather(-1, batch["target"].unsqueeze(-1)).squeeze(-1)

    def prediction(self, p: Params, batch: tree.Tree) -> Tensor:
        """Prediction of an evaluation: the logits."""
        return self.logits(p, batch)

    def score_of(self, output: Tensor, batch: tree.Tree) -> Tensor:
        """Accuracy of every sample, 0 or 1, `[*L, B]`."""
        return (output.argmax(-1) == batch["target"]).float()


def _add_classes(state: State, classes: Tensor) -> State:
    """Add classes `[*L, C]` to the known ones in the state."""
    p = state["params"]
    known = p["buffers"]["known_classes"]
    return {**state, "params": {**p, "buffers": {**p["buffers"], "known_classes": known | classes.to(known.device)}}}

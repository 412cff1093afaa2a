"""ER-ACE, replay with an asymmetric cross-entropy (Caccia et al., 2022): new samples push no old class away.

The loss of the incoming minibatch is over the classes that are in it, that of the replayed one over all known classes:

    loss = CE(f(x), y; classes of this minibatch) + CE(f(x'), y'; all known classes),   (x', y') from a reservoir

With plain replay the first steps on new classes drive up their logits against those of all old ones, whose features
then have to be learned again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.method import Memory, Method, StepInfo, Task
from rlmeta.learning.predictive import check_predictive
from rlmeta.learning.settings import require_range
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.replay import Replay


@dataclass(frozen=True)
class ERACE(Method):
    """Settings of ER-ACE, and the method itself."""

    size: int = 200
    """Capacity of the reservoir in samples."""
    batch_size: int = 0
    """Replayed samples in every step; 0 for the size of the minibatch."""

    name = "er_ace"
    recordable = True

    def __post_init__(self) -> None:
        require_range(self, "size", 0)
        require_range(self, "batch_size", 0)

    @property
    def _replay(self) -> Replay:
        return Replay(size=self.size, batch_size=self.batch_size, balance="none")

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory: an empty reservoir.

        Raises:
            SettingError: the learner has no classes.
        """
        check_predictive(learner)
        if not learner.classes:
            raise SettingError("ER-ACE changes the classes of a cross-entropy: use it with a Classifier, else Replay")
        return self._replay.init(learner, state)

    def batch(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task) -> tree.Tree:
        """Allow the minibatch's own classes alone."""
        if not self.size:
            return batch
        target = batch["target"]
        present = torch.zeros(*target.shape[:-1], learner.classes, dtype=torch.bool, device=target.device)
        present = present.scatter(-1, target, torch.ones_like(target, dtype=torch.bool)).unsqueeze(-2)
        allowed = batch.get("allowed")
        own = present.expand(*target.shape, -1) if allowed is None else allowed & present
        return {**batch, "allowed": own}

    def batches(
        self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor
    ) -> Sequence[tuple[tree.Tree, float | Tensor]]:
        """Draw a minibatch from the reservoir."""
        return self._replay.batches(learner, p, m, batch, task, key)

    def after_step(self, learner: Any, info: StepInfo, p: Params, m: Memory, task: Task, key: Tensor) -> Memory:
        """Offer the minibatch to the reservoir."""
        return self._replay.after_step(learner, info, p, m, task, key)

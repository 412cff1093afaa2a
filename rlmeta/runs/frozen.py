"""Freeze inactive learners: their state stays bit-identical while the other learners of the batch go on training."""

from __future__ import annotations

from rlmeta.functional import tree
from rlmeta.learning.state import State

REPORTED = ("metrics", "best", "progress", "stage", "task", "identity", "matrix", "population")
"""Parts of the state that count or describe a learner, and may change while it is frozen."""
ACTING = ("world", "memory", "episode")
"""Parts of the state that move on with gymnasium's environments, which cannot be restored for one learner alone."""


class FrozenLearners:
    """Copies of the state of learners that stopped, to restore it after every iteration.

    Args:
        native: whether the environments are rlmeta's own, whose state can be restored.
    """

    def __init__(self, native: bool) -> None:
        self._moving = REPORTED if native else REPORTED + ACTING
        self._kept: dict[int, State] = {}

    def hold(self, state: State) -> None:
        """Restore every inactive learner's state to where it stopped, in place; copy that of one that just stopped."""
        self.forget_revived(state)
        active = state["active"]
        if bool(active.all()):
            return
        still = {name: part for name, part in state.items() if name not in self._moving}
        for learner in (~active).nonzero().flatten().tolist():
            kept = self._kept.setdefault(learner, tree.map(lambda leaf, i=learner: leaf[i].clone(), still))
            tree.map(lambda old, leaf, i=learner: leaf[i].copy_(old), kept, still)

    def forget_revived(self, state: State) -> None:
        """Drop the copies of learners that are active again, as in a population."""
        if self._kept:
            active = state["active"].tolist()
            self._kept = {learner: kept for learner, kept in self._kept.items() if not active[learner]}

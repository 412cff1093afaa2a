"""Learners that are not active any more stay bit for bit where they stopped, while the others go on."""

from __future__ import annotations

from rlmeta.functional import tree
from rlmeta.learning.state import State

REPORTED = ("metrics", "best", "progress", "stage", "task", "identity", "matrix", "population")
"""What of a state is about a learner and not the learner itself, so that a frozen one's may still change."""
ACTING = ("world", "memory", "episode")
"""What moves on with live environments, which can't be put back while their neighbours go on."""


class FrozenLearners:
    """Copies of the learners that stopped, as they were then.

    Args:
        native: whether the environments are rlmeta's own, which can be put back.
    """

    def __init__(self, native: bool) -> None:
        self._moving = REPORTED if native else REPORTED + ACTING
        self._kept: dict[int, State] = {}

    def hold(self, state: State) -> None:
        """Put every learner that is not active back to where it stopped, which one that just has is already."""
        self.forget_revived(state)
        active = state["active"]
        if bool(active.all()):
            return
        still = {name: part for name, part in state.items() if name not in self._moving}
        for learner in (~active).nonzero().flatten().tolist():
            kept = self._kept.setdefault(learner, tree.map(lambda leaf, i=learner: leaf[i].clone(), still))
            tree.map(lambda old, leaf, i=learner: leaf[i].copy_(old), kept, still)

    def forget_revived(self, state: State) -> None:
        """Let go of where learners had stopped that are active again: one that stops anew stays where it is then."""
        if self._kept:
            active = state["active"].tolist()
            self._kept = {learner: kept for learner, kept in self._kept.items() if not active[learner]}

"""Every agent x network x observation x problem, native and gymnasium's: it works, or one sentence refuses it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch

import rlmeta as rl
from rlmeta.engine import capture
from rlmeta.functional import tree
from rlmeta.runs.train import prepare
from tests.crossings import NETWORKS, OBSERVATIONS, PROBLEMS, GymWalk, labelled, network, shown, walks

WORLDS = ("native", "gymnasium")
ON_POLICY = ("ppo", "a2c", "reinforce", "trpo", "impala", "ppg")
MEMORIES = {
    "ppo with a gru": {"memory": "gru", "memory_size": 3},
    "a2c with an lstm": {"memory": "lstm", "memory_size": 3, "memory_layers": 2},
    "dqn with a gru": {"memory": "gru", "memory_size": 3, "sequence_length": 4},
    "sac with a gru": {"memory": "gru", "memory_size": 3, "sequence_length": 4},
    "reinforce with attention": {"memory": "attention", "memory_size": 4, "attention_heads": 2, "context": 3},
}
AGENTS = (*ON_POLICY, *MEMORIES, "dqn", "rainbow", "sac", "discrete sac", "td3", "ddpg", "behaviour cloning", "gail")
OFFLINE = ("iql", "cql", "decision transformer")
CONTINUOUS = ("sac", "sac with a gru", "td3", "ddpg")
LEARNERS = ("classifier", "regressor")


class Crossing(NamedTuple):
    """One cell of the table."""

    agent: str
    network: str
    observation: str
    problem: str
    world: str

    def __str__(self) -> str:
        return "-".join(self).replace(" ", "_")


ACTING = [Crossing(*values) for values in itertools.product(AGENTS, NETWORKS, OBSERVATIONS, PROBLEMS, WORLDS)]
RECORDED = [Crossing(*values) for values in itertools.product(OFFLINE, NETWORKS, OBSERVATIONS, PROBLEMS, WORLDS)]
LABELLED = [
    Crossing(*values)
    for values in itertools.product(LEARNERS, NETWORKS, ("box", "bytes"), ("task", "stream"), WORLDS[:1])
]


def pairwise(cells: Sequence[Crossing]) -> Iterator[Crossing]:
    """A few of the cells in which every two values meet that meet in any."""
    pairs = {cell: set(itertools.combinations(enumerate(cell), 2)) for cell in cells}
    left = set().union(*pairs.values())
    while left:
        best = max(cells, key=lambda cell: len(pairs[cell] & left))
        left -= pairs[best]
        yield best


def settings(cell: Crossing) -> Any:
    """The agent, small."""
    own = {"network": network(cell.network)} | ({"hidden_sizes": (8,)} if cell.network == "mlp" else {})
    few = {"num_envs": 2, "num_steps": 4, **own}
    replayed = {"learning_starts": 8, "batch_size": 4, "capacity": 32}
    if cell.agent in ("behaviour cloning", "gail"):
        given = shown(cell.observation, cell.world == "native")
        if cell.agent == "gail":
            return rl.GAIL(demonstrations=given, batch_size=8, num_epochs=2, discriminator_updates=2, **few)
        white = cell.observation == "box"  # of Dict and Discrete there is nothing to whiten, and a sentence says so
        return rl.BehaviourCloning(demonstrations=given, num_steps=4, batch_size=8, normalise_observation=white, **own)
    if cell.agent in OFFLINE:
        given: Any = {"demonstrations": shown(cell.observation, cell.world == "native"), "num_steps": 4}
        given["batch_size"] = 4
        if cell.agent == "decision transformer":
            own.pop("hidden_sizes", None)
            white = cell.observation == "box"
            small = {"context": 3, "features": 8, "layers": 1, "normalise_observation": white}
            return rl.DecisionTransformer(**given, **small, **own)
        return rl.IQL(**given, **own) if cell.agent == "iql" else rl.CQL(**given, **own)
    if cell.agent in MEMORIES:
        few |= {"sees": ("action", "reward", "start"), **MEMORIES[cell.agent]}
    return {
        "ppo": lambda: rl.PPO(batch_size=4, num_epochs=2, **few),
        "a2c": lambda: rl.A2C(**few),
        "reinforce": lambda: rl.REINFORCE(**few),
        "dqn": lambda: rl.DQN(gradient_steps=1, **few, **replayed),
        "trpo": lambda: rl.TRPO(batch_size=4, value_epochs=2, conjugate_steps=3, line_search_steps=4, **few),
        "impala": lambda: rl.IMPALA(num_epochs=2, sequences=1, **few),
        "ppg": lambda: rl.PPG(batch_size=4, auxiliary_every=2, auxiliary_epochs=2, **few),
        "sac": lambda: rl.SAC(gradient_steps=1, state_dependent_exploration=True, **few, **replayed),
        "discrete sac": lambda: rl.SAC(gradient_steps=1, **few, **replayed),
        "rainbow": lambda: rl.Rainbow(gradient_steps=2, learning_rate=1e-3, head_sizes=(4,), **few, **replayed),
        "td3": lambda: rl.TD3(gradient_steps=2, **few, **replayed),
        "ddpg": lambda: rl.DDPG(gradient_steps=1, **few, **replayed),
        "classifier": lambda: rl.Classifier(batch_size=4, num_steps=4, **own),
        "regressor": lambda: rl.Regressor(batch_size=4, num_steps=4, **own),
    }[cell.agent.partition(" with ")[0]]()


def problem_of(cell: Crossing) -> Any:
    """What it learns."""
    if cell.agent not in LEARNERS:
        return walks(cell.problem, cell.observation, cell.world == "native", cell.agent in CONTINUOUS)
    tasks = [labelled(cell.observation, 2 if cell.agent == "classifier" else 0, i) for i in range(2)]
    return rl.stream(tasks, "points", scenario="task") if cell.problem == "stream" else tasks[0]


def cross(cell: Crossing) -> str:
    """Train a few steps and use what comes out; what is refused gives the sentence that refuses it."""
    budget = rl.Budget(steps=64, final_episodes=2, eval_episodes=2, eval_every=32)
    methods = [rl.EWC(samples=4)] if cell.problem == "stream" else []
    try:
        given = settings(cell), problem_of(cell)
        first = prepare(*given, budget, seeds=2, lifelong=methods)
    except rl.RlmetaError as error:
        return str(error)
    first.close()
    run = rl.train(*given, budget=budget, seeds=2, lifelong=methods)
    before, after = ({**state["params"]["weights"], **state["params"]["buffers"]} for state in (first.state, run.state))
    moved = {name: not torch.equal(value, after[name]) for name, value in before.items() if name in after}
    frozen = {name for name in moved if "frozen" in name and cell.network.startswith("group")}
    assert not any(moved[name] for name in frozen), f"frozen layers moved: {sorted(n for n in frozen if moved[n])}"
    assert any(moved.values()), "nothing was learned"
    assert bool(run.scores.isfinite().all()) and bool(run.evaluate(2).returns.isfinite().all())
    learned = {name: part for name, part in run.state["params"].items() if name != "hyper"}
    assert all(bool(leaf.isfinite().all()) for leaf in tree.leaves(learned)) and bool(run.state["active"].all())
    if cell.agent not in LEARNERS:
        for deterministic in (True, False):
            observation, _ = GymWalk(cell.observation, continuous=cell.agent in CONTINUOUS).reset(seed=0)
            action = run.act(observation, deterministic=deterministic, learner=1)
            if cell.agent in (*MEMORIES, "decision transformer"):
                first, memory = action
                action, _ = run.act(observation, memory, 1.0, deterministic=deterministic, learner=1)
                assert first in run.world.action_space
            assert action in run.world.action_space
            assert cell.observation != "masked" or action == 1, "a masked action was taken"
    return ""


def expected_to_be_refused(cell: Crossing) -> bool:
    """A family draws the constants of environments that are rlmeta's own; EWC needs a distribution over actions, and
    gradient steps; a force can't be masked."""
    foreign = cell.problem == "family" and cell.world == "gymnasium"
    values_alone = cell.agent.startswith(("dqn", "rainbow", "trpo", "decision")) and cell.problem == "stream"
    masked = cell.agent in (*CONTINUOUS, "decision transformer") and cell.observation == "masked"
    return foreign or values_alone or masked


def check(cell: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "WARM_UP", 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(horizon|not recorded).*")
        said = cross(cell)
    assert bool(said) == expected_to_be_refused(cell), said or "nothing refused it"
    assert len(said.split()) > 4 or not said


@pytest.mark.parametrize("cell", [*pairwise(ACTING), *pairwise(LABELLED)], ids=str)
def test_every_two_of_them_meet(cell: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    check(cell, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*ACTING, *LABELLED, *RECORDED], ids=str)
def test_all_of_them_meet(cell: Crossing, monkeypatch: pytest.MonkeyPatch) -> None:
    check(cell, monkeypatch)

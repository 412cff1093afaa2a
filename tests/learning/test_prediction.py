"""`run.predict`: what a meta-learner says of a task of one's own, and what is no task."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.regression import Sinusoid
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import tree

SETTINGS: dict[str, Any] = {
    "maml": rl.MAML(rl.Classifier(hidden_sizes=(6,)), num_envs=3, inner_rate=0.4),
    "maml of lines": rl.MAML(rl.Regressor(hidden_sizes=(6,), activation="tanh"), num_envs=3, inner_rate=0.05),
    "protonet": rl.ProtoNet(num_envs=3, hidden_sizes=(6,)),
}


@functools.cache
def trained(name: str) -> rl.Run:
    problem = NamedFamily("lines", Sinusoid(shots=4, queries=3)) if name == "maml of lines" else "few-shot-digits"
    return rl.train(SETTINGS[name], problem, steps=30, seeds=2, final_episodes=4)


def tasks(run: rl.Run, count: int = 3) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    drawn = tree.map(lambda x: x[0], run.experiment.world().tasks(run.state["key"], 0, count, "test"))
    return (drawn["support"]["observation"], drawn["support"]["target"]), drawn["query"]["observation"]


@pytest.mark.parametrize("name", SETTINGS)
def test_tasks_at_once_are_tasks_alone_as_arrays_or_tensors(name: str) -> None:
    run = trained(name)
    (x, y), query = tasks(run)
    several = run.predict((x, y), query, learner=1)
    assert several.shape == (3, query.shape[1], 1 if name == "maml of lines" else 3)
    for k in range(3):
        alone = run.predict((x[k].numpy(), y[k].numpy()), query[k].double().tolist(), learner=1)
        torch.testing.assert_close(alone, several[k], atol=1e-5, rtol=1e-5)
        one = run.predict([x[k], y[k]], query[k, :1], learner=1)
        torch.testing.assert_close(one, several[k, :1], atol=1e-5, rtol=1e-5)
    if name != "maml of lines":
        torch.testing.assert_close(several.sum(-1), torch.ones(several.shape[:-1]))
        with pytest.raises(SpaceError, match="targets are float32, expected whole numbers"):
            run.predict((x, y.float()), query)


def test_maml_takes_as_many_steps_as_it_is_told() -> None:
    run = trained("maml of lines")
    (x, y), query = tasks(run, 1)
    w = {n: v[0].clone().requires_grad_() for n, v in run.state["params"]["weights"].items()}

    def net(x: torch.Tensor) -> torch.Tensor:
        names = sorted(w)
        return torch.tanh(x @ w[names[1]].T + w[names[0]]) @ w[names[3]].T + w[names[2]]

    torch.testing.assert_close(run.predict((x[0], y[0]), query[0], steps=0, learner=0), net(query[0]).detach())
    for _ in range(3):
        moves = torch.autograd.grad((net(x[0]) - y[0]).square().mean(), list(w.values()))
        w = {n: (v - 0.05 * g).detach().requires_grad_() for (n, v), g in zip(w.items(), moves)}
    said = run.predict((x[0], y[0]), query[0], steps=3, learner=0)
    torch.testing.assert_close(said, net(query[0]).detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run.predict((x[0], y[0]), query[0], learner=0), said)


def test_a_run_that_is_read_back_predicts_the_same(tmp_path: Any) -> None:
    run = rl.train(SETTINGS["protonet"], "few-shot-digits", steps=30, out=tmp_path / "run", final_episodes=4)
    support, query = tasks(run, 1)
    again = rl.load(tmp_path / "run").predict((support[0][0], support[1][0]), query[0])
    assert torch.equal(run.predict((support[0][0], support[1][0]), query[0]), again)


X, Y = np.zeros((3, 8, 8)), np.arange(3)


@pytest.mark.parametrize("name", ["maml", "protonet"])
@pytest.mark.parametrize(
    ("support", "query", "reason"),
    [
        (X, X, "support is ndarray, expected a pair"),
        ((X[..., :7], Y), X, r"the support's inputs have the shape \[3, 8, 7\], expected \[n, 8, 8\] for one task or"),
        ((X, Y), X[0], r"the query's inputs have the shape \[8, 8\], expected \[n, 8, 8\] for one task"),
        ((X, Y[:2]), X, r"\[3\] inputs of the support, \[2\] targets of the support, \[3\] inputs of the query"),
        ((X, Y), X[None], r"\[3\] inputs of the support, .*\[1, 3\] inputs of the query: expected \[n\]"),
        ((X[None], Y[None]), np.stack([X, X]), r"\[2, 3\] inputs of the query"),
        ((X, np.zeros(3, int)), X, "the support of task 0 has no sample of class 1"),
        ((X, Y + 1), X, "element 3, counted from 0"),
        ((np.stack([X, X]), np.stack([Y, Y[[0, 1, 1]]])), np.stack([X, X]), "task 1 has no sample of class 2"),
        ((X, Y), X[:0], r"the query's inputs have the shape \[0, 8, 8\]"),
        ((X * np.nan, Y), X, "the support's inputs are not finite"),
        ((X, ["a", "b", "c"]), X, "the support's targets are of list, expected an array"),
    ],
)
def test_what_is_no_task_is_refused(name: str, support: Any, query: Any, reason: str) -> None:
    with pytest.raises((SettingError, SpaceError), match=reason):
        trained(name).predict(support, query)


def test_steps_that_cannot_be_taken_and_runs_that_are_shown_nothing_are_refused() -> None:
    with pytest.raises(SettingError, match="ProtoNet averages the support, it can't take 2 steps"):
        trained("protonet").predict((X, Y), X, steps=2)
    for name in ("maml", "protonet"):
        for steps in (-1, 1.5, True, "2"):
            with pytest.raises(SettingError, match=f"steps is {steps!r}, expected a whole number, at least 0"):
                trained(name).predict((X, Y), X, steps=steps)  # type: ignore[arg-type]
    assert trained("maml").predict((X, Y), X, steps=np.int64(2)).shape == (3, 3)  # type: ignore[arg-type]
    for run in (
        rl.train(rl.PPO(num_envs=4, num_steps=8, batch_size=32), "CartPole-v1", steps=32, final_episodes=1),
        rl.train(rl.MAML(rl.REINFORCE(num_envs=2, num_steps=20)), "navigation-short", steps=2000, final_episodes=1),
    ):
        with pytest.raises(SettingError, match="does not predict from a support set: give one of MAML or ProtoNet"):
            run.predict((X, Y), X)


@pytest.mark.parametrize("name", ["maml", "protonet"])
def test_inputs_in_another_unit_are_refused_and_those_outside_of_the_bounds_are_told(name: str) -> None:
    run = trained(name)
    low, high = run.world.observation_space.low.min(), run.world.observation_space.high.max()
    picture = np.full((3, 8, 8), 255, np.uint8)
    with pytest.raises(SpaceError, match=r"inputs are uint8 from 255 to 255, outside of Box.*: scale them"):
        run.predict((picture, Y), X)
    with pytest.raises(SpaceError, match="the query's inputs are int64 from 255 to 255, outside of Box"):
        run.predict((X, Y), picture.astype(np.int64))
    with pytest.warns(RuntimeWarning, match="the query's inputs reach from 255 to 255, outside of the tasks' Box"):
        run.predict((X, Y), picture.astype(np.float32))
    assert low == 0 < high, "so black pictures of bytes are in the same unit"
    assert run.predict((X.astype(np.uint8), Y), X).equal(run.predict((X, Y), X))

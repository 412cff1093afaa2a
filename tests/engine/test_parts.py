"""Parts of the learners on threads of their own, put together again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import rlmeta as rl
from rlmeta.engine import capture as capture_module
from rlmeta.engine.parts import in_parts, one_core
from rlmeta.functional import tree
from rlmeta.functional.packed import Packed
from rlmeta.runs.experiment import Budget


@pytest.fixture(autouse=True)
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("learners", [1, 2, 5])
def test_parts_make_the_whole(learners: int) -> None:
    weights = Packed.of({"w": torch.randn(learners, 2, 3), "b": torch.randn(learners, 3)}, 1)
    state = {"weights": weights, "count": torch.arange(learners)}
    sizes = []

    def double(state: tree.Tree, factor: torch.Tensor) -> tree.Tree:
        sizes.append((len(factor), torch.get_num_threads()))
        like = state["weights"]
        return {**state, "weights": Packed.view(like.flat * factor.unsqueeze(-1), like, 1)}, {"factor": factor}

    found, other = in_parts(double, state, 2.0 + torch.arange(learners))
    assert sorted(sizes) == {1: [(1, 2)], 2: [(1, 1), (1, 1)], 5: [(2, 1), (3, 1)]}[learners]
    assert torch.equal(found["count"], torch.arange(learners)) and torch.equal(other["factor"], 2.0 + found["count"])
    assert isinstance(found["weights"], Packed) and found["weights"]["w"].shape == (learners, 2, 3)
    for name, weight in found["weights"].items():
        factor = other["factor"].reshape(-1, *(1,) * (weight.dim() - 1))
        assert torch.equal(weight, weights[name] * factor)
    assert torch.get_num_threads() == 2


def test_every_part_begins_where_what_is_allocated_begins() -> None:
    """A matrix product of the same numbers has other bits elsewhere: recordings were dropped, a resume could differ."""
    begins = []

    def note(state: tree.Tree, x: torch.Tensor) -> tree.Tree:
        begins.extend(leaf.data_ptr() % 64 for leaf in (state["weights"].flat, x))
        return state

    in_parts(note, {"weights": Packed.of({"w": torch.randn(4, 9155)}, 1)}, torch.randn(4, 7))
    assert begins == [0] * 4


def test_an_error_in_a_part_is_raised() -> None:
    def fails(x: torch.Tensor) -> tree.Tree:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        in_parts(fails, torch.zeros(2))


def test_one_core_is_given_back() -> None:
    with one_core(True):
        assert torch.get_num_threads() == 1
    with one_core(False):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2


def test_training_in_parts_repeats_and_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "WARM_UP", 3)

    def weights(threads: int) -> torch.Tensor:
        agent = rl.PPO(num_envs=2, num_steps=32, num_epochs=4, batch_size=32)
        budget = Budget(steps=512, eval_every=5120, final_episodes=1)
        run = rl.train(agent, "CartPole-v1", seeds=5, threads=threads, budget=budget)
        return torch.cat([weight.flatten() for weight in run.state["params"]["weights"].values()])

    first, again, alone = weights(2), weights(2), weights(1)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, alone)

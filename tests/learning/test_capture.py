"""A recorded function gives the same bits as the function, for the names and shapes it was recorded for."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

import rlmeta as rl
from rlmeta.functional import random, tree
from rlmeta.lab.experiment import Budget
from rlmeta.learning import capture as capture_module
from rlmeta.learning.capture import Capture, Function
from rlmeta.nn.product import layers


def gradient(inputs: tree.Tree) -> tree.Tree:
    weight = inputs["weight"].detach().requires_grad_()
    with torch.enable_grad():
        loss = torch.tanh(inputs["x"] @ weight).square().mean()
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, weight)[0]}


def inputs(seed: int, rows: int = 5) -> tree.Tree:
    torch.manual_seed(seed)
    return {"x": torch.randn(rows, 3), "weight": torch.randn(3, 2)}


def test_replays_equal_calls_bit_for_bit_and_take_new_values():
    calls = []

    def counted(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return gradient(given)

    capture = Capture(warm_up=3)
    for seed in range(10):
        given = inputs(seed)
        found, expected = capture("loss", counted, given), gradient(given)
        assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)
        assert not found["gradient"].requires_grad
    assert len(calls) == 3 + 3  # the third is recorded, three check the recording


def test_large_products_are_recorded_as_they_are_called():
    def wide(given: tree.Tree) -> tree.Tree:
        weight = given["weight"].detach().requires_grad_()
        with torch.enable_grad():
            loss = layers(given["x"], (weight, given["bias"]), (torch.tanh,)).square().sum()
        return {"gradient": torch.autograd.grad(loss, weight)[0]}

    capture, calls = Capture(warm_up=3), []
    for seed in range(8):
        torch.manual_seed(seed)
        given = {"x": torch.randn(2, 128, 300), "weight": torch.randn(2, 128, 300), "bias": torch.randn(2, 1, 128)}
        found = capture("wide", lambda x: calls.append(1) or wide(x), given)  # type: ignore[func-returns-value]
        assert torch.equal(found["gradient"], wide(given)["gradient"])
    assert len(calls) == 3 + 3


def test_other_shapes_and_names_are_recorded_apart():
    capture = Capture(warm_up=1)
    for rows in (5, 7, 5, 7):
        assert torch.equal(capture("a", gradient, inputs(0, rows))["loss"], gradient(inputs(0, rows))["loss"])
    doubled = capture("b", lambda given: {"loss": 2 * gradient(given)["loss"]}, inputs(0))
    assert torch.equal(doubled["loss"], 2 * gradient(inputs(0))["loss"])


def test_a_function_that_looks_at_values_is_never_replayed():
    capture = Capture(warm_up=1)

    def branches(given: tree.Tree) -> tree.Tree:
        return {"y": given["x"] if bool(given["x"].sum() > 0) else -given["x"]}

    for sign in (1.0, -1.0, 1.0, -1.0):
        assert capture("branches", branches, {"x": torch.ones(2) * sign})["y"].tolist() == [1.0, 1.0]


def test_a_function_with_a_memory_of_its_own_is_never_replayed():
    capture, count = Capture(warm_up=1), [0.0]

    def counts(given: tree.Tree) -> tree.Tree:
        count[0] += 1.0
        return {"y": given["x"] + count[0]}

    assert [capture("counts", counts, {"x": torch.zeros(())})["y"].item() for _ in range(2)] != [1.0, 1.0]


def test_random_numbers_follow_the_key():
    capture = Capture(warm_up=2)
    for seed in range(6):
        keys = random.make_keys([seed, seed + 1])
        found = capture("draw", lambda given: {"x": random.normal(given["key"], "a", 0, (4,))}, {"key": keys})
        assert torch.equal(found["x"], random.normal(keys, "a", 0, (4,)))


def test_training_is_the_same_with_and_without(monkeypatch):
    def weights(warm_up: int, agent: object) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(capture_module, "WARM_UP", warm_up)
        run = rl.train(agent, "CartPole-v1", seeds=2, budget=Budget(steps=1024, final_episodes=2))
        return dict(run.state["params"]["weights"])

    for agent in (rl.PPO(num_steps=32, num_epochs=4), rl.A2C(), rl.DQN(), rl.REINFORCE()):
        plain, replayed = weights(10**9, agent), weights(3, agent)
        assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_an_agent_whose_settings_have_no_network_can_be_bound():
    from dataclasses import dataclass

    import gymnasium as gym

    from rlmeta.agents.agent import Agent

    @dataclass(frozen=True)
    class Settings:
        """A user's own."""

    agent = Agent(Settings(), gym.spaces.Discrete(2), gym.spaces.Discrete(2))
    assert agent.capture is not None


# ---------------------------------------------------------------------- calls in a row


def descent(given: tree.Tree) -> tree.Tree:
    """A step with momentum whose rows show what is carried: before the call, after it, and as it came."""
    carried, fixed = given["carried"], given["fixed"]
    weight = carried["weight"].detach().requires_grad_()
    with torch.enable_grad():
        loss = (torch.tanh(fixed["x"] @ weight[:, :2]) * given["each"]["scale"]).square().sum()
    gradient = torch.autograd.grad(loss, weight)[0]
    momentum = torch.lerp(carried["momentum"], gradient, 0.1)
    after = carried["weight"] - fixed["rate"] * momentum
    kept = {"weight": after, "momentum": momentum, "key": carried["key"]}
    return {"carried": kept, "row": {"loss": loss.detach(), "before": carried["weight"], "momentum": momentum}}


def scanned(seed: int, times: int) -> tuple[tree.Tree, tree.Tree, tree.Tree]:
    torch.manual_seed(seed)
    carried = {"weight": torch.randn(3, 2), "momentum": torch.randn(3, 2), "key": torch.randn(2)}
    return carried, {"x": torch.randn(5, 3), "rate": torch.rand(())}, {"scale": torch.randn(times, 2)}


def one_by_one(function: Function, given: tuple[tree.Tree, tree.Tree, tree.Tree], times: int) -> list[torch.Tensor]:
    """Call by call."""
    carried, fixed, each = given
    rows = []
    for i in range(times):
        found = function({"carried": carried, "fixed": fixed, "each": {name: x[i] for name, x in each.items()}})
        carried, row = found["carried"], found["row"]
        rows.append([value.clone() for value in row.values()])
    return [*carried.values(), *(torch.stack(column, 0) for column in zip(*rows))]


def same(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("times", [1, 4])
def test_calls_in_a_row_are_the_same_bits_and_leave_their_inputs_alone(times: int):
    capture, calls = Capture(warm_up=3), []

    def counted(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return descent(given)

    for seed in range(12):
        given = scanned(seed, times)
        before = tree.map(torch.clone, given[0])
        carried, rows = capture.scan("descent", counted, *given, times)
        assert same(tree.leaves(carried), one_by_one(descent, given, times)[:3])
        assert same(tree.leaves(rows), one_by_one(descent, given, times)[3:])
        assert same(tree.leaves(given[0]), tree.leaves(before))
    assert len(calls) < 12 * times if times > 1 else len(calls) == 3 + 1 + 3


def test_rows_are_stacked_where_asked():
    def shown(given: tree.Tree) -> tree.Tree:
        found = descent(given)
        return {**found, "row": {"before": found["row"]["before"]}}

    capture = Capture(warm_up=1)
    for seed in range(5):
        given = scanned(seed, 3)
        _, rows = capture.scan("shown", shown, *given, 3, axis=1)
        assert torch.equal(rows["before"][:, 0], given[0]["weight"]) and rows["before"].shape == (3, 3, 2)


def test_what_is_written_in_place_and_seen_by_others_stays_so():
    def writes(given: tree.Tree) -> tree.Tree:
        x = given["carried"]["x"] * 2
        first = x[:1]
        x.add_(given["fixed"]["y"])  # `first` sees this
        z = given["fixed"]["y"] + 1
        z.mul_(z)
        return {"carried": {"x": x + first}, "row": {"first": first + 0, "z": z, "ones": torch.ones_like(z)}}

    capture = Capture(warm_up=1)
    for seed in range(8):
        torch.manual_seed(seed)
        given = ({"x": torch.randn(3, 2)}, {"y": torch.randn(3, 2)}, {})
        carried, rows = capture.scan("writes", writes, *given, 3)
        assert same([*carried.values(), *rows.values()], one_by_one(writes, given, 3))
        rows["ones"].zero_()  # the caller's own


def test_two_that_change_places_are_not_written_over():
    def swap(given: tree.Tree) -> tree.Tree:
        a, b = given["carried"]["a"], given["carried"]["b"]
        return {"carried": {"a": b, "b": a + 1}, "row": {"sum": a + b, "b": b}}

    capture = Capture(warm_up=1)
    for seed in range(8):
        torch.manual_seed(seed)
        given = ({"a": torch.randn(3), "b": torch.randn(3)}, {}, {})
        carried, rows = capture.scan("swap", swap, *given, 5)
        assert same([*carried.values(), *rows.values()], one_by_one(swap, given, 5))


def test_a_scan_whose_shapes_change_is_never_a_program():
    def grows(given: tree.Tree) -> tree.Tree:
        return {"carried": {"x": torch.cat([given["carried"]["x"]] * 2)}, "row": {}}

    capture = Capture(warm_up=1)
    for _ in range(3):
        assert capture.scan("grows", grows, {"x": torch.ones(1)}, {}, {}, 3)[0]["x"].shape == (8,)


def not_there(function: object) -> None:
    raise OSError("could not get source code")


def of_another_function(function: object, script=torch.jit.script) -> object:
    return script(no_loop)


def no_loop(x: torch.Tensor) -> torch.Tensor:
    def inner() -> torch.Tensor:
        return x

    return inner()


@pytest.mark.parametrize("script", [not_there, of_another_function])
def test_without_its_own_source_a_scan_is_never_a_program(script: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.jit, "script", script)
    capture = Capture(warm_up=1)
    given = scanned(0, 3)
    with pytest.warns(RuntimeWarning, match="rlmeta's own source has changed or is not there"):
        carried, rows = capture.scan("descent", descent, *given, 3)
    assert same([*carried.values(), *rows.values()], one_by_one(descent, given, 3))
    assert same(tree.leaves(capture.scan("descent", descent, *given, 3)[0]), carried.values())

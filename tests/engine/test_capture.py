"""A recorded function gives the same bits as the function, for the names and shapes it was recorded for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rlmeta as rl
from rlmeta.engine import capture as capture_module
from rlmeta.engine.backends import Python, TorchScript, chosen
from rlmeta.engine.capture import Capture, Function, _Program
from rlmeta.engine.tape import Tape, own_memory
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.nn.product import layers
from rlmeta.runs.experiment import Budget
from rlmeta.runs.train import prepare


@pytest.fixture(params=["torchscript", "python"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with either backend."""
    monkeypatch.setenv("RLMETA_BACKEND", request.param)
    return request.param


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


def branches(given: tree.Tree) -> tree.Tree:
    return {"y": given["x"] * 2 if bool(given["x"].sum() > 0) else -given["x"]}


@pytest.mark.filterwarnings("error:.*not recorded")
def test_a_branch_is_recorded_for_either_case():
    capture, calls = Capture(warm_up=1), []

    def counted(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return branches(given)

    for number in range(60):
        x = torch.ones(2) if number < 20 or number % 3 else -torch.ones(2)
        x = x * (1 + number)
        assert torch.equal(capture("branches", counted, {"x": x})["y"], branches({"x": x})["y"])
    assert len(calls) == 1 + 3 + 1 + 3  # either case is recorded and checked


def test_only_recordings_whose_numbers_fit_are_tried(monkeypatch: pytest.MonkeyPatch):
    """One replay shows the number that Python would have seen, which says which other recording to try, if any."""
    capture, x, replays = Capture(warm_up=1), torch.rand(4), []
    call = _Program.__call__
    monkeypatch.setattr(_Program, "__call__", lambda program, given: replays.append(program) or call(program, given))

    def times(inputs: tree.Tree) -> tree.Tree:
        return {"y": inputs["x"] * (int(inputs["n"]) + 0.5)}

    def replayed(number: int) -> int:
        replays.clear()
        outputs = capture("times", times, {"x": x, "n": torch.tensor(number)})
        assert torch.equal(outputs["y"], x * (number + 0.5))
        return len(replays)

    for number in (0, 1, 2):
        for _ in range(12):
            replayed(number)
    assert replayed(2) == 1, "the one that fitted last"
    assert replayed(0) == 2, "one that shows 0, and that of 0"
    assert replayed(7) == 1, "there is none of 7"


@pytest.mark.parametrize("read", [int, float, lambda x: float(x.double()), lambda x: int(x.clone().add_(1))])
def test_numbers_that_always_change_are_given_up_and_say_so(read: Callable[[torch.Tensor], float]) -> None:
    capture = Capture(warm_up=1)

    def powers(given: tree.Tree) -> tree.Tree:
        return {"y": torch.full((2,), float(read(given["x"]))) * given["x"]}

    with pytest.warns(RuntimeWarning, match="powers: not recorded.*looks at the numbers.*change too often"):
        for number in range(200):
            given = {"x": torch.tensor(float(number))}
            assert torch.equal(capture("powers", powers, given)["y"], powers(given)["y"])


def test_a_guarded_number_is_the_one_that_was_looked_at_whatever_is_written_to_it_later():
    capture, calls = Capture(warm_up=1), []

    def clamps(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        x = given["x"].clone()
        large = bool(x > 1)
        x.mul_(0)
        return {"y": x + (7.0 if large else 3.0)}

    found = [capture("clamps", clamps, {"x": torch.tensor(value)})["y"].item() for value in [5.0] * 9 + [0.5, 6.0]]
    assert found == [7.0] * 9 + [3.0, 7.0] and len(calls) == 1 + 3 + 1


def test_nan_may_be_a_guarded_number():
    capture, calls = Capture(warm_up=1), []

    def named(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return {"y": given["x"] * (2.0 if float(given["x"]) != float(given["x"]) else 3.0)}

    for _ in range(9):
        assert capture("named", named, {"x": torch.tensor(torch.nan)})["y"].isnan()
    assert len(calls) == 1 + 3
    assert capture("named", named, {"x": torch.tensor(2.0)})["y"].item() == 6.0


HIDDEN: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "rows of a mask": lambda x, m: x.sum() / x[m].shape[0],
    "views of the rows of a mask": lambda x, m: x[m].unsqueeze(1).transpose(0, 2).sum(),
    "masked_select": lambda x, m: torch.masked_select(x, m.unsqueeze(1)).numel(),
    "nonzero": lambda x, m: m.nonzero().numel(),
    "where": lambda x, m: len(torch.where(m)[0]),
    "unique": lambda x, m: len(torch.unique(m)),
    "bincount": lambda x, m: torch.bincount(m.long(), minlength=2).square(),
    "repeat_interleave": lambda x, m: torch.repeat_interleave(x, m.long() + 1, 0).shape[0],
    "tensor of a list": lambda x, m: torch.tensor([m.sum()]),
    "as_tensor of a list": lambda x, m: torch.as_tensor([[m.sum(), 1]]),
    "asarray of a list": lambda x, m: torch.asarray((m.sum(),)),
    "new_tensor of a list": lambda x, m: x.new_tensor([m.sum()]),
    "Tensor of a list": lambda x, m: torch.Tensor([m.sum()]),
    "FloatTensor of a list": lambda x, m: torch.FloatTensor([m.sum()]),
    "new of a list": lambda x, m: x.new([m.sum()]),
    "allclose": lambda x, m: 2 if torch.allclose(m.float(), torch.ones(())) else 3,
    "equal": lambda x, m: 2 if torch.equal(m, torch.ones_like(m)) else 3,
    "tolist": lambda x, m: sum(m.tolist()),
    "numpy": lambda x, m: float(m.numpy().sum()),
    "array": lambda x, m: float(np.asarray(m).sum()),
    "dlpack": lambda x, m: float(np.from_dlpack(m.float()).sum()),
    "storage": lambda x, m: sum(m.untyped_storage().tolist()),
    "all at once": lambda x, m: torch._foreach_add_([x.clone()], 1)[0].sum(),
}


@pytest.mark.parametrize("read", HIDDEN.values(), ids=HIDDEN)
def test_what_python_or_shapes_make_of_numbers_without_a_word_is_not_recorded(
    read: Callable[[torch.Tensor, torch.Tensor], Any],
) -> None:
    capture = Capture(warm_up=3)

    def function(given: tree.Tree) -> tree.Tree:
        return {"y": given["x"].sum() * read(given["x"], given["mask"])}

    def call(ones: int) -> None:
        given = {"x": torch.arange(24.0).reshape(8, 3), "mask": torch.arange(8) < ones}
        assert torch.equal(capture("function", function, given)["y"], function(given)["y"])

    with pytest.warns(RuntimeWarning, match="function: not recorded"):
        for _ in range(10):  # the number that is hidden stays the same until every recording would be trusted
            call(5)
    call(8)
    call(3)


@pytest.mark.parametrize("write", [lambda x: x.mul_(2), lambda x: x[0].zero_(), lambda x: x.__setitem__(1, 7.0)])
def test_what_writes_to_its_inputs_does_so_in_every_call(write: Callable[[torch.Tensor], Any]) -> None:
    def writes(given: tree.Tree) -> tree.Tree:
        write(given["x"])
        return {"y": given["x"].sum()}

    capture = Capture(warm_up=3)
    with pytest.warns(RuntimeWarning, match="writes: not recorded.*writes to a tensor that it was given"):
        for seed in range(9):
            x = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
            expected = x.clone()
            write(expected)
            capture("writes", writes, {"x": x})
            assert torch.equal(x, expected)


@pytest.mark.filterwarnings("error:.*not recorded")
def test_a_list_of_tensors_is_no_look_at_their_numbers():
    outputs = Capture(warm_up=1)("listed", lambda given: {"y": torch.stack(list(given["x"]))}, {"x": torch.ones(2)})
    assert outputs["y"].tolist() == [1, 1]


@pytest.mark.filterwarnings("error:.*not recorded")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_loop_whose_branch_turns_is_as_without_a_recording(axis: int) -> None:
    def body(given: tree.Tree) -> tree.Tree:
        x = given["carried"]["x"]
        x = x * 1.5 if bool((x.sum() < given["fixed"]["limit"]).all()) else x - given["each"]["step"]
        return {"carried": {"x": x}, "row": {"y": x.sum((0, 1), keepdim=True) + 0 * x}}

    capture, calls = Capture(warm_up=1), []

    def counted(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return body(given)

    for limit in (1e9, 1e9, 1e9, 1e9, 40.0, 0.0, 0.0, 0.0, 0.0, 1e9):
        carried = {"x": torch.arange(4.0).reshape(2, 2)}
        given = carried, {"limit": torch.tensor(limit)}, {"step": torch.linspace(0, 1, 6)}, 6, axis
        calls.clear()
        found, expected = capture.scan("turns", counted, *given), Capture(backends=()).scan("turns", body, *given)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected) for name in a)
    assert not calls  # either case is recorded, and the last call met one


def test_a_function_with_a_memory_of_its_own_is_never_replayed():
    capture, count = Capture(warm_up=1), [0.0]

    def counts(given: tree.Tree) -> tree.Tree:
        count[0] += 1.0
        return {"y": given["x"] + count[0]}

    with pytest.warns(RuntimeWarning, match="counts: not recorded.*other numbers"):
        assert [capture("counts", counts, {"x": torch.zeros(())})["y"].item() for _ in range(2)] == [1.0, 2.0]


def test_random_numbers_follow_the_key():
    capture = Capture(warm_up=2)
    for seed in range(6):
        keys = random.make_keys([seed, seed + 1])
        found = capture("draw", lambda given: {"x": random.normal(given["key"], "a", 0, (4,))}, {"key": keys})
        assert torch.equal(found["x"], random.normal(keys, "a", 0, (4,)))


TASKS = ["FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalking-v1", "GridWorld-v0", "Bandit-v0", "Navigation-v0"]
TASKS += ["DeepSea-v0", "Pendulum-v1", "MountainCarContinuous-v0", "Acrobot-v1", "cartpole-physics", "CartPole-fixed"]
TASKS += ["MinAtar/Breakout-v1", "MinAtar/SpaceInvaders-v1", "MinAtar/Asterix-v0", "Catch-v0", "TMaze-v0"]
TASKS += ["RepeatPrevious-easy", "CartPole-noisy-easy", "PointReach-v0"]
AGENTS = [rl.PPO(num_steps=16, batch_size=64, num_epochs=4), rl.A2C(), rl.REINFORCE(num_steps=40)]
AGENTS += [rl.DQN(learning_starts=16, gradient_steps=2)]


@pytest.mark.filterwarnings("error:.*not recorded")
@pytest.mark.parametrize(
    "agent, task",
    [
        *((rl.A2C(num_steps=32), task) for task in TASKS),
        *((agent, task) for agent in AGENTS for task in ("FrozenLake-v1", "CartPole-v1")),
    ],
)
def test_every_native_task_is_recorded_and_learned_as_without(
    agent: object, task: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task.startswith(("MinAtar", "Catch")) and backend == "torchscript":
        monkeypatch.delenv("RLMETA_BACKEND")  # it takes no gradient of a convolution; by default the next backend does
    ends = []
    for warm_up in (10**9, 3):
        monkeypatch.setattr(capture_module, "WARM_UP", warm_up)
        run = prepare(agent, task, Budget(steps=10_000), seeds=2)
        for _ in range(9):
            run.state, _ = run.agent.iterate(run.state, run.world)
        ends.append(run.state)
    programs = run.agent.capture._programs.values()
    assert len(programs) >= 2 and None not in programs
    assert all(tree.flatten(tree.map(torch.equal, *ends)).values())


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
        rows.append([value.clone() for value in tree.leaves(row)])
    return [*tree.leaves(carried), *(torch.stack(column, 0) for column in zip(*rows))]


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
    assert len(calls) < 12 * times if times > 1 else len(calls) == 2 + 1 + 3


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
        assert same([*tree.leaves(carried), *tree.leaves(rows)], one_by_one(writes, given, 3))
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
        assert same([*tree.leaves(carried), *tree.leaves(rows)], one_by_one(swap, given, 5))


def test_a_scan_whose_shapes_change_is_never_a_program():
    def grows(given: tree.Tree) -> tree.Tree:
        return {"carried": {"x": torch.cat([given["carried"]["x"]] * 2)}, "row": {}}

    capture = Capture(warm_up=1)
    with pytest.warns(RuntimeWarning, match="grows: not recorded.*shapes"):
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
def test_without_its_own_source_torchscript_makes_no_loop(script: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.jit, "script", script)
    capture = Capture(warm_up=1, backends=[TorchScript()])
    given = scanned(0, 3)
    with pytest.warns(RuntimeWarning, match="rlmeta.s own source has changed or is not there"):
        carried, rows = capture.scan("descent", descent, *given, 3)
    assert same([*tree.leaves(carried), *tree.leaves(rows)], one_by_one(descent, given, 3))
    assert same(tree.leaves(capture.scan("descent", descent, *given, 3)[0]), tree.leaves(carried))


# ---------------------------------------------------------------------- names


def pair(given: tree.Tree) -> tree.Tree:
    """A call that fills its dictionaries in another order than it finds them."""
    old, fixed = given["carried"], given["fixed"]
    row = {"z": old["a"] * fixed["b"], "y": old["deep"]["q"] - fixed["a"]}
    return {"row": row, "carried": {"deep": {"p": old["deep"]["q"], "q": old["a"] + 1}, "a": old["deep"]["p"]}}


def pair_inputs(seed: int, turned: bool) -> tuple[tree.Tree, tree.Tree]:
    a, p, q, b, c = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).unbind(0)
    if turned:
        return {"deep": {"q": q, "p": p}, "a": a}, {"b": b, "a": c}
    return {"a": a, "deep": {"p": p, "q": q}}, {"a": c, "b": b}


def test_what_is_carried_is_paired_by_name_in_whatever_order_dictionaries_are_filled():
    capture, calls = Capture(warm_up=1), []

    def counted(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return pair(given)

    for seed in range(9):
        carried, rows = capture.scan("pair", counted, *pair_inputs(seed, seed % 2 == 0), {}, 5)
        expected, fixed = pair_inputs(seed, seed % 2 == 1)
        each = []
        for _ in range(5):
            found = pair({"carried": expected, "fixed": fixed})
            expected, row = found["carried"], found["row"]
            each.append(row)
        assert tree.map(torch.equal, carried, expected) == {"deep": {"p": True, "q": True}, "a": True}
        stacked = tree.map(lambda *steps: torch.stack(steps), *each)
        assert tree.map(torch.equal, rows, stacked) == {"z": True, "y": True}
        assert list(carried) == ["deep", "a"] and list(rows) == ["z", "y"]
    assert len(calls) == 1 + 3 * 2, "recorded once, checked: one program for both orders"


def test_single_calls_are_paired_by_name_too():
    def minus(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return {"b": given["b"] - given["a"], "a": given["a"] * 1}

    capture, calls = Capture(warm_up=1), []
    for number in range(8):
        a, b = torch.tensor([1.0 + number]), torch.tensor([10.0])
        found = capture("minus", minus, {"a": a, "b": b} if number % 2 else {"b": b, "a": a})
        assert found["b"].item() == 9.0 - number and found["a"].item() == 1.0 + number
    assert len(calls) == 1 + 3


def test_other_names_of_the_same_shapes_are_recorded_apart():
    capture = Capture(warm_up=1)
    x, y = torch.tensor([1.0]), torch.tensor([2.0])
    for _ in range(6):
        assert capture("sum", lambda given: {"y": given["a"] + 2 * given["b"]}, {"a": x, "b": y})["y"].item() == 5
        assert capture("sum", lambda given: {"y": 2 * given["b"] + given["c"]}, {"b": x, "c": y})["y"].item() == 4
        nested = {"a": {"b": x}, "b": {}, "c": y}
        assert capture("sum", lambda given: {"y": given["a"]["b"] - given["c"]}, nested)["y"].item() == -1
    assert len(capture._programs) == 3 and None not in capture._programs.values()


def test_a_scan_that_renames_what_it_carries_is_never_a_program():
    def renames(given: tree.Tree) -> tree.Tree:
        return {"carried": {"b": next(iter(given["carried"].values())) + 1}, "row": {}}

    capture = Capture(warm_up=1)
    with pytest.warns(RuntimeWarning, match="renames: not recorded.*other names"):
        for _ in range(3):
            assert capture.scan("renames", renames, {"a": torch.zeros(1)}, {}, {}, 3)[0]["b"].item() == 3


# ---------------------------------------------------------------------- strides


def packed_view() -> torch.Tensor:
    """As every weight of an agent lies: learners apart by more than the weight is long, at an odd place."""
    return torch.rand(2, 43)[:, 3:39].view(2, 4, 9)


def channels_last() -> torch.Tensor:
    return torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "packed view": packed_view,
    "expanded": lambda: torch.rand(3, 1).expand(3, 4),
    "a number for all": lambda: torch.rand(()).expand(3, 4),
    "transposed": lambda: torch.rand(4, 3).mT,
    "every other": lambda: torch.rand(8, 6)[1::2, ::3],
    "windows that overlap": lambda: torch.rand(9).unfold(0, 4, 2),
    "channels last": channels_last,
    "empty": lambda: torch.rand(3, 0, 2),
    "an odd place": lambda: torch.rand(14)[1:13].view(3, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_are_recorded_with_their_own_strides(layout: str):
    def reads(given: tree.Tree) -> tree.Tree:
        x = given["fixed"]["x"]
        flat = x.reshape(-1).tanh()  # a view of what lies one behind the other, else a copy
        return {
            "carried": {"sum": given["carried"]["sum"] + flat, "x": given["carried"]["x"] * 2},
            "row": {"x": x * 2, "each": given["each"]["x"].reshape(-1) + given["carried"]["x"].reshape(-1)},
        }

    make, calls = LAYOUTS[layout], []

    def counted(given: tree.Tree) -> tree.Tree:
        calls.append(1)
        return reads(given)

    capture = Capture(warm_up=1)
    for seed in range(8):
        torch.manual_seed(seed)
        fixed, each = make(), torch.stack([make() for _ in range(3)])
        carried = {"sum": torch.zeros(fixed.numel()), "x": make()}
        before = [carried["x"].clone(), fixed.clone()]
        given = (carried, {"x": fixed}, {"x": each})
        found, rows = capture.scan("reads", counted, *given, 3)
        assert same([*tree.leaves(found), *tree.leaves(rows)], one_by_one(reads, given, 3))
        assert same([carried["x"], fixed], before)
    assert len(calls) == 1 + 3 * 2


def test_a_copy_in_memory_of_its_own_lies_as_the_tensor_does():
    for make in LAYOUTS.values():
        x = make()
        copy = own_memory(x)
        assert torch.equal(copy, x) and copy.stride() == x.stride() and copy._base is None
        assert copy.numel() == 0 or (copy.data_ptr() - x.data_ptr()) % 64 == 0
        assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or copy.numel() == 0


def test_what_python_makes_of_numbers_in_a_call_is_a_constant():
    def shifts(given: tree.Tree) -> tree.Tree:
        shift = torch.tensor([1.0, 2.0])
        moved = given["carried"]["x"] + shift
        return {"carried": {"x": moved}, "row": {"y": shift.mul_(moved)}}  # written to: the next call has it anew

    capture, calls = Capture(warm_up=1), []
    for _ in range(7):
        found = capture.scan("shifts", lambda x: calls.append(1) or shifts(x), {"x": torch.zeros(2)}, {}, {}, 3)  # type: ignore[func-returns-value]
        assert found[0]["x"].tolist() == [3, 6] and found[1]["y"].tolist() == [[1, 4], [2, 8], [3, 12]]
    assert len(calls) == 1 + 3 * 2


# ---------------------------------------------------------------------- errors


class Breaks(Python):
    """Its programs work for so many calls, together or each."""

    def __init__(self, times: int, together: bool) -> None:
        self.times, self.together, self.done = times, together, [0]

    def compile(self, tape: Tape, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
        real, done = super().compile(tape, examples), self.done if self.together else [0]

        def play(given: list[torch.Tensor]) -> list[torch.Tensor]:
            done[0] += 1
            if done[0] > self.times:
                if self.together:
                    given[0].add_(1.0)  # whatever a loop has half done to what it carries
                raise RuntimeError("first line\nthe machine broke")
            return real(given)

        return play


@pytest.mark.parametrize("times", [0, 1, 3, 5, 8, 20, 40])
def test_an_error_in_a_program_is_said_once_and_the_run_goes_on_without(times: int):
    capture = Capture(warm_up=2, backends=[Breaks(times, together=True)])
    with pytest.warns(RuntimeWarning, match="descent: not recorded.*RuntimeError: the machine broke") as said:
        for seed in range(12):
            given = scanned(seed, 4)
            before = scanned(seed, 4)
            carried, rows = capture.scan("descent", descent, *given, 4)
            assert same([*tree.leaves(carried), *tree.leaves(rows)], one_by_one(descent, before, 4))
            assert all(same(tree.leaves(one), tree.leaves(other)) for one, other in zip(given, before))
    assert len(said) == 1


@pytest.mark.parametrize("times", [0, 1, 2, 20])
def test_an_error_in_the_first_backend_leaves_the_work_to_the_next(times: int):
    breaks = Breaks(times, together=True)
    capture = Capture(warm_up=2, backends=[breaks, Python()])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(12):
            given = scanned(seed, 4)
            carried, rows = capture.scan("descent", descent, *given, 4)
            assert same([*tree.leaves(carried), *tree.leaves(rows)], one_by_one(descent, scanned(seed, 4), 4))
    late = times == 20  # it was checked and taken; then it broke
    assert len(said) == late and (None in capture._programs.values()) == late
    assert late or breaks.done[0] == times + 1


@pytest.mark.parametrize("times", [0, 1, 3, 5])
def test_an_error_in_the_program_of_single_calls_is_said_once(times: int):
    capture = Capture(warm_up=2, backends=[Breaks(times, together=False)])
    with pytest.warns(RuntimeWarning, match="loss: not recorded.*the machine broke") as said:
        for seed in range(9):
            found, expected = capture(("loss", 3), gradient, inputs(seed)), gradient(inputs(seed))
            assert same(tree.leaves(found), tree.leaves(expected))
    assert len(said) == 1


def test_what_the_first_backend_refuses_is_generated_python_and_nobody_is_told():
    def normalises(given: tree.Tree) -> tree.Tree:
        weight = given["weight"].detach().requires_grad_()
        with torch.enable_grad():
            loss = F.group_norm(given["x"], 2, weight).square().mean()
        return {"gradient": torch.autograd.grad(loss, weight)[0]}

    class Refuses(TorchScript):
        def compile(self, tape: Tape, examples: Sequence[torch.Tensor]) -> Any:
            raise RuntimeError("unsupported")

    capture = Capture(warm_up=1, backends=[Refuses(), Python()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(6):
            given = {"x": torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)), "weight": torch.ones(4)}
            assert torch.equal(capture("norm", normalises, given)["gradient"], normalises(given)["gradient"])
    assert all(program is not None for program in capture._programs.values())


def test_the_environment_variable_names_the_backend(monkeypatch: pytest.MonkeyPatch):
    for name, expected in (("python", ["python"]), ("none", []), ("", ["torchscript", "python"])):
        monkeypatch.setenv("RLMETA_BACKEND", name)
        assert [backend.name for backend in chosen()] == expected
    monkeypatch.setenv("RLMETA_BACKEND", "cuda")
    with pytest.raises(SettingError, match="RLMETA_BACKEND is 'cuda', expected torchscript, python or none"):
        chosen()


def test_an_error_while_recording_is_said_once(monkeypatch: pytest.MonkeyPatch):
    def fails(*args: object) -> None:
        raise MemoryError("no room for notes")

    monkeypatch.setattr(capture_module, "record", fails)
    capture = Capture(warm_up=2)
    with pytest.warns(RuntimeWarning, match="not recorded, so this run is slower .MemoryError: no room") as said:
        for seed in range(4):
            assert same(capture("loss", gradient, inputs(seed)).values(), gradient(inputs(seed)).values())
            given = scanned(seed, 3)
            carried, rows = capture.scan("loss", descent, *given, 3)
            assert same([*tree.leaves(carried), *tree.leaves(rows)], one_by_one(descent, given, 3))
    assert len(said) == 1


def test_an_operation_that_no_tracer_knows_is_called_as_ever():
    def convolves(given: tree.Tree) -> tree.Tree:
        weight = given["weight"].detach().requires_grad_()
        with torch.enable_grad():
            loss = F.conv2d(given["x"], weight.reshape(4, 2, 3, 3), groups=2, padding=1).square().sum()
        return {"gradient": torch.autograd.grad(loss, weight)[0]}

    flat = torch.rand(2, 2 * 2 * 9 + 3)
    capture = Capture(warm_up=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said, where this torch's tracer does not know how
        for _ in range(6):
            given = {"x": torch.rand(3, 4, 5, 5), "weight": flat[:, 3:].view(2, 2, 2, 3, 3)}
            assert torch.equal(capture("conv", convolves, given)["gradient"], convolves(given)["gradient"])


def test_an_error_of_the_functions_own_comes_out_as_it_is():
    def refuses(given: tree.Tree) -> tree.Tree:
        raise SettingError("no such group")

    capture = Capture(warm_up=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with pytest.raises(SettingError, match="no such group") as raised:
                capture("refuses", refuses, inputs(0))
            assert raised.value.__context__ is None
            with pytest.raises(SettingError, match="no such group"):
                capture.scan("refuses", refuses, *scanned(0, 3), 3)

"""Every pass over recorded operations gives a tape that computes the same bits, without a check that would catch it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlmeta.engine.backends import BACKENDS, Backend
from rlmeta.engine.capture import Capture
from rlmeta.engine.passes import batched, direct_views, split, without_idle, without_writes, written_over
from rlmeta.engine.tape import NotRecordable, Tape, record
from rlmeta.functional import random, tree


def seen_by_a_view(x: Tensor, a: Tensor) -> list[Tensor]:
    y = x.clone()
    y[0].add_(1.0)  # the rest of y is still needed
    return [y * 2.0]


def written_to_what_was_viewed(x: Tensor, a: Tensor) -> list[Tensor]:
    y = x + 1.0
    row = y[0]
    y.mul_(3.0)  # the view shows it
    return [row + 1.0]


def read_twice(x: Tensor, a: Tensor) -> list[Tensor]:
    b = (x + 1.0).neg()
    c = b.exp()
    return [b + c]


def shared_by_a_transpose(x: Tensor, a: Tensor) -> list[Tensor]:
    y = x + a
    return [y * y.mT]


def of_fixed_alone(x: Tensor, a: Tensor) -> list[Tensor]:
    return [a * 2.0, (a + 1.0) * x]


def fixed_and_written(x: Tensor, a: Tensor) -> list[Tensor]:
    b = a + 1.0
    c = b[0]
    total = x + c
    b.add_(x)
    return [total, b.sum(0) + c]


def chained(x: Tensor, a: Tensor) -> list[Tensor]:
    y = (x + a).tanh()
    z = (y * 2.0).sigmoid().add_(a)
    return [z.sqrt() - y, y]


def written_over_in_turn(x: Tensor, a: Tensor) -> list[Tensor]:
    y = (x + a).exp()  # lies where x + a lay
    z = y.neg()
    return [y.mul(z), z]


def viewed_after_a_write(x: Tensor, a: Tensor) -> list[Tensor]:
    y = x + 1.0
    y.mul_(a)
    return [y.unsqueeze(0) * 2.0]


def views_of_views(x: Tensor, a: Tensor) -> list[Tensor]:
    y = x + a
    turned = y.mT.unsqueeze(0).expand(2, 3, 3)
    again = y.mT.unsqueeze(0).expand(2, 3, 3).view(2, 3, 3)
    return [turned * 2.0 + again[1], y.mT.mT.exp(), x.mT.unsqueeze(0).squeeze(0) @ a, y[1:].mT.unsqueeze(-1).neg()]


def a_view_written_to(x: Tensor, a: Tensor) -> list[Tensor]:
    y = (x * a).contiguous()
    y.mT.unsqueeze(0).add_(1.0)
    return [y * 2.0]


FUNCTIONS: list[Callable[[Tensor, Tensor], list[Tensor]]] = [
    seen_by_a_view,
    written_to_what_was_viewed,
    read_twice,
    shared_by_a_transpose,
    of_fixed_alone,
    fixed_and_written,
    chained,
    written_over_in_turn,
    viewed_after_a_write,
    views_of_views,
    a_view_written_to,
]


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, 3, generator=generator), torch.rand(3, 3, generator=generator)]


def recorded(function: Callable[[Tensor, Tensor], list[Tensor]]):
    x, a = tensors(0)

    def named(given: tree.Tree) -> tree.Tree:
        return {str(i): value for i, value in enumerate(function(given["first"], given["second"]))}

    return record(named, {"first": x, "second": a})[1]


def assert_computes(found: list[Tensor], function: Callable[[Tensor, Tensor], list[Tensor]], seed: int) -> None:
    expected = function(*tensors(seed))
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_pass_keeps_the_bits_and_the_inputs(function):
    tape = recorded(function)
    ordinary = without_writes(tape)
    short = direct_views(without_idle(ordinary))
    for one in (
        tape,
        ordinary,
        without_idle(ordinary),
        written_over(without_idle(ordinary)),
        short,
        written_over(short),
    ):
        given = tensors(7)
        assert_computes(one.play(given), function, 7)
        assert all(torch.equal(a, b) for a, b in zip(given, tensors(7)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_depends_on_fixed_inputs_is_computed_once_and_used_again(function):
    tape = without_idle(without_writes(recorded(function)))
    before, rest = split(tape, tape.inputs[1:])
    rest = written_over(rest)
    fixed = tensors(3)[1]
    known = before.play([torch.zeros(3, 3), fixed])
    for seed in (3, 4, 3):
        x = tensors(seed)[0]
        found, expected = rest.play([x, fixed, *known]), function(x, fixed)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        for output in found:  # the caller's: to write to them changes nothing that is used again
            output.zero_()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_spare_inputs_may_be_written_over(function):
    tape = without_idle(without_writes(recorded(function)))
    assert_computes(written_over(tape, tape.inputs).play(tensors(5)), function, 5)


def test_operations_are_spared():
    tape = recorded(chained)
    shorter = written_over(without_idle(without_writes(tape)))
    assert len(split(without_writes(recorded(of_fixed_alone)), tape.inputs[1:])[0].operations) == 1, "a + 1"
    assert len(shorter.operations) == len(tape.operations)
    assert len({shorter.memory[x] for one in shorter.operations for x in one.results}) < len(shorter.operations)


def test_views_of_views_are_made_once_and_directly():
    tape = without_idle(without_writes(recorded(views_of_views)))
    shorter = direct_views(tape)
    assert count(tape, "transpose") == 6 and count(tape, "expand") == 2
    assert count(shorter, "transpose") + count(shorter, "expand") + count(shorter, "unsqueeze") <= 3
    assert len(shorter.operations) <= len(tape.operations) - 8


def count(tape: Tape, name: str) -> int:
    return sum(operation.function._schema.name == f"aten::{name}" for operation in tape.operations)


def test_a_later_view_does_not_keep_a_write_in_place():
    assert not without_writes(recorded(viewed_after_a_write)).pinned
    assert without_writes(recorded(seen_by_a_view)).pinned


def test_random_numbers_of_a_loop_are_drawn_for_all_calls_at_once():
    """What is left of a draw in the body is its logarithms: their bits may depend on how many numbers there are."""

    def body(inputs: tree.Tree) -> tree.Tree:
        return {"row": inputs["x"] + random.gumbel(inputs["key"], "action", 0, (3,))}

    keys, x = random.make_keys(range(5)), torch.rand(2, 3)
    _, tape, _ = record(body, {"key": keys[:2], "x": x})
    carried_first = replace(tape, inputs=tape.inputs[::-1])
    first, rest = batched(without_idle(without_writes(carried_first)), 1, 1)
    assert len(first.operations) > 30 and count(first, "log") == 0
    assert count(rest, "__rshift__") == 0 and len(without_idle(rest).operations) < 10
    rows = [first.play([keys[number : number + 2]]) for number in range(4)]
    together = torch.func.vmap(lambda key: first.play([key])[0])(torch.stack([keys[n : n + 2] for n in range(4)]))
    for number, row in enumerate(rows):
        assert torch.equal(together[number], row[0])
        expected = body({"key": keys[number : number + 2], "x": x})["row"]
        assert torch.equal(rest.play([x, *row])[0], expected)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (16,)])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_scan_of_draws_gives_the_bits_of_single_draws(backend: Backend, shape: tuple[int, ...]):
    capture = Capture(warm_up=1, backends=[backend])
    weight = torch.rand(16, 16)[: max(1, math.prod(shape)), : max(1, math.prod(shape))].contiguous()

    def draw(inputs: tree.Tree) -> tree.Tree:
        noise = random.uniform(inputs["each"]["key"], "noise", 0, shape)
        total = inputs["carried"]["total"] + noise.log()
        return {"carried": {"total": total}, "row": {"product": noise.reshape(2, -1) @ inputs["fixed"]["weight"]}}

    for first in range(4):
        keys = random.make_keys(range(first, first + 14)).reshape(7, 2)
        total = torch.zeros(2, *shape)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            carried, rows = capture.scan("draw", draw, {"total": total}, {"weight": weight}, {"key": keys}, 7)
        for key, row in zip(keys, rows["product"]):
            found = draw({"carried": {"total": total}, "fixed": {"weight": weight}, "each": {"key": key}})
            total = found["carried"]["total"]
            assert torch.equal(row, found["row"]["product"])
        assert torch.equal(carried["total"], total)


def test_rows_of_which_one_is_a_view_and_all_are_none():
    """All rows can't be viewed as one of them: the loop is recorded without computing for all calls at once."""
    capture, rows = Capture(warm_up=1), torch.arange(48).reshape(2, 4, 6).movedim(0, 1)[:, :, :3]

    def shift(inputs: tree.Tree) -> tree.Tree:
        shifted = (inputs["each"]["rows"] + 1).view(6)
        return {"carried": {"total": inputs["carried"]["total"] + shifted}, "row": {"shifted": shifted * 2}}

    for _ in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, outputs = capture.scan("shift", shift, {"total": torch.zeros(6)}, {}, {"rows": rows}, 4)
        for number in range(4):
            assert torch.equal(outputs["shifted"][number], (rows[number] + 1).flatten() * 2)


def test_strides_of_axes_of_size_one_may_change_from_call_to_call():
    """They reach no element: a loop of one learner with one environment is recorded as any other."""
    capture = Capture(warm_up=1)

    def turn(inputs: tree.Tree) -> tree.Tree:
        x = (inputs["carried"]["x"] + 1.0).as_strided((1, 1, 3), (7, 5, 1))
        return {"carried": {"x": x}, "row": {"y": x * 2.0}}

    for _ in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            carried, rows = capture.scan("turn", turn, {"x": torch.zeros(1, 1, 3)}, {}, {}, 4)
        assert carried["x"].tolist() == [[[4.0] * 3]]
        assert rows["y"][:, 0, 0, 0].tolist() == [2.0, 4.0, 6.0, 8.0]
    assert any(programs for programs in capture._programs.values())


def test_what_writes_to_an_input_is_not_recorded():
    def doubled_after_a_write(x: Tensor, a: Tensor) -> list[Tensor]:
        row = a[0]
        row.add_(x[0])  # a view of the input
        return [a * 2.0]

    with pytest.raises(NotRecordable, match="writes to a tensor that it was given"):
        recorded(doubled_after_a_write)


def test_a_chain_of_elementwise_operations_takes_one_piece_of_memory():
    def chain(x: Tensor, a: Tensor) -> list[Tensor]:
        return [(x + a).exp().neg().sigmoid()]

    tape = written_over(without_writes(recorded(chain)))
    assert len({tape.memory[place] for operation in tape.operations for place in operation.results}) == 1


def test_a_program_that_gives_something_else_is_dropped():
    factor = [2.0]
    capture = Capture(warm_up=1)

    def times(given: tree.Tree) -> tree.Tree:
        return {"y": given["x"] * torch.full((3, 3), factor[0])}

    x = tensors(0)[0]
    assert torch.equal(capture("times", times, {"x": x})["y"], x * 2.0)  # recorded
    factor[0] = 3.0
    with pytest.warns(RuntimeWarning, match="times: not recorded.*other numbers"):
        assert torch.equal(capture("times", times, {"x": x})["y"], x * 3.0)
    for _ in range(6):
        assert torch.equal(capture("times", times, {"x": x})["y"], x * 3.0)


def test_other_strides_are_recorded_apart():
    capture = Capture(warm_up=1)

    def flat(given: tree.Tree) -> tree.Tree:
        return {"y": given["x"].reshape(-1) + 1.0}  # a view of rows that lie one behind the other, else a copy

    x = tensors(0)[0]
    for given in [x] * 6 + [x.mT] * 6:
        assert torch.equal(capture("flat", flat, {"x": given})["y"], given.flatten() + 1.0)


def test_a_loop_whose_carried_tensor_changes_its_layout_is_never_a_program():
    capture = Capture(warm_up=1)

    def turn(given: tree.Tree) -> tree.Tree:
        x = given["carried"]["x"]
        return {"carried": {"x": x.mT * 2.0}, "row": {"flat": x.reshape(-1) + given["fixed"]["a"]}}

    x, a = tensors(0)[0], torch.ones(9)
    for number in range(6):
        with pytest.warns(RuntimeWarning, match="strides") if number == 0 else nullcontext():
            carried, rows = capture.scan("turn", turn, {"x": x}, {"a": a}, {}, 5)
        now, flat = x, []
        for _ in range(5):
            flat.append(now.flatten() + a)
            now = now.mT * 2.0
        assert torch.equal(carried["x"], now) and torch.equal(rows["flat"], torch.stack(flat))

"""Repeat previous against POPGym's rules in plain Python, transition by transition."""

from __future__ import annotations

import pytest
import torch

import rlmeta as rl
from rlmeta.envs.native import NativeWorld, RepeatPrevious
from rlmeta.errors import SettingError
from rlmeta.functional import random


class Plain:
    """POPGym 1.0.7's `RepeatPrevious`, with the cards that are dealt."""

    def __init__(self, decks: int, k: int, first: int) -> None:
        self.cards, self.k, self.hand = 52 * decks, k, [first]

    def step(self, action: int, card: int) -> tuple[float, bool]:
        reward, scale = 0.0, 1 / (self.cards - self.k)
        terminated = self.cards - len(self.hand) == 1
        if len(self.hand) >= self.k:
            reward = scale if action == self.hand[-self.k] else -scale
        self.hand.append(card)
        return reward, terminated


@pytest.mark.parametrize(("decks", "k"), [(1, 1), (1, 4), (2, 32)])
def test_transitions_equal_plain_python(decks: int, k: int) -> None:
    """Two episodes of two learners of two rows; every other action is right."""
    world = NativeWorld(RepeatPrevious(decks, k), (2,), 2)
    state = world.reset(random.make_keys([0, 1]))
    plain = [[Plain(decks, k, int(suit)) for suit in rows] for rows in world.observation(state)]
    generator, ends = torch.Generator().manual_seed(0), 0
    for t in range(2 * (52 * decks - 1)):
        action = torch.randint(4, (2, 2), generator=generator)
        if t % 2:
            action = torch.tensor([[game.hand[-k:][0] for game in rows] for rows in plain])
        state, transition = world.step(state, action)
        for i, rows in enumerate(plain):
            for n, game in enumerate(rows):
                reward, over = game.step(int(action[i, n]), int(transition.next_observation[i, n]))
                assert float(transition.reward[i, n]) == pytest.approx(reward)
                assert bool(transition.terminated[i, n]) == over
                if over:
                    ends += 1
                    assert torch.tensor(game.hand).bincount().tolist() == [13 * decks] * 4
                    rows[n] = Plain(decks, k, int(transition.observation[i, n]))
    assert ends == 8


def test_decks_are_shuffled() -> None:
    """Every suit is first as often as another, and follows itself a little less often, as cards are not put back."""
    world = NativeWorld(RepeatPrevious(), (), 4000)
    state = world.reset(random.make_keys([0])[0])
    first = world.observation(state)
    _, transition = world.step(state, torch.zeros(4000, dtype=torch.int64))
    assert bool(((first.bincount() - 1000).abs() < 4 * 28).all())
    assert float((first == transition.observation).double().mean()) == pytest.approx(12 / 51, abs=4 * 0.0067)


@pytest.mark.parametrize(("level", "cards", "k"), [("easy", 52, 4), ("medium", 104, 32), ("hard", 156, 64)])
def test_the_best_return_is_1(level: str, cards: int, k: int) -> None:
    task = rl.task(f"RepeatPrevious-{level}")
    assert (task.source.cards, task.source.k) == (cards, k)
    world = task.world((), 3)
    state = world.reset(random.make_keys([0])[0])
    total, seen = torch.zeros(3), [world.observation(state)]
    for _ in range(cards - 1):
        state, transition = world.step(state, seen[max(0, len(seen) - k)])
        seen.append(transition.next_observation)
        total += transition.reward
    assert bool(transition.terminated.all())
    torch.testing.assert_close(total, torch.ones(3))


def test_a_k_beyond_the_deck_is_refused() -> None:
    with pytest.raises(SettingError, match="decks=1, k=52"):
        RepeatPrevious(k=52)

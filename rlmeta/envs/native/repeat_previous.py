"""Repeat previous: name the suit of a card that was dealt some steps ago (POPGym, Morad et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.envs.native.base import NativeEnv, Physics
from rlmeta.envs.native.drawing import PALETTE, Drawing, Picture, cells
from rlmeta.envs.world import State
from rlmeta.errors import SettingError

_SUITS = 4


@dataclass(frozen=True)
class RepeatPrevious(NativeEnv):
    """RepeatPrevious of POPGym: an action names the suit of the card `k` cards ago; that shown is the first.

    The cards of `decks` shuffled decks of 52 are dealt one a step, to the last. As soon as there are k, every action
    pays 1 / (cards - k) if it is right and -1 / (cards - k) if not, so that the best return is 1 and guessing has -0.5.
    The suits are drawn without replacement, which equals a shuffled deck whose ranks nobody sees.
    """

    decks: int = 1
    k: int = 4
    max_episode_steps: int | None = None

    reset_noise = 1
    step_noise = 1

    def __post_init__(self) -> None:
        if self.decks < 1 or not 1 <= self.k < self.cards:
            raise SettingError(
                f"RepeatPrevious: decks={self.decks}, k={self.k}: expected at least one deck, and k from 1 to less "
                "than its cards"
            )

    @property
    def cards(self) -> int:
        """Number of cards of all decks."""
        return 52 * self.decks

    @cached_property
    def observation_space(self) -> gym.Space:
        """Space of the suit that is shown."""
        return gym.spaces.Discrete(_SUITS)

    @cached_property
    def action_space(self) -> gym.Space:
        """Space of the suit that is named."""
        return gym.spaces.Discrete(_SUITS)

    def reset(self, noise: Tensor, physics: Physics) -> State:
        """The first card of full decks."""
        shape = noise.shape[:-1]
        full = torch.full((*shape, _SUITS), self.cards // _SUITS, dtype=torch.int64, device=noise.device)
        suit, left = _deal(full, noise[..., 0])
        recent = torch.zeros(*shape, self.k, dtype=torch.int64, device=noise.device)
        return {"recent": torch.cat((recent[..., 1:], suit.unsqueeze(-1)), -1), "left": left}

    def step(self, state: State, action: Tensor, noise: Tensor, physics: Physics) -> tuple[State, Tensor, Tensor]:
        """Pay for the action, then deal a card."""
        left, recent = state["left"], state["recent"]
        count = left.sum(-1)
        right = torch.where(action == recent[..., 0], 1.0, -1.0) / (self.cards - self.k)
        reward = torch.where(self.cards - count >= self.k, right, 0.0)
        suit, left = _deal(left, noise[..., 0])
        new = {"recent": torch.cat((recent[..., 1:], suit.unsqueeze(-1)), -1), "left": left}
        return new, reward.float(), count == 1

    def observe(self, state: State) -> Tensor:
        """The suit of the last card."""
        return state["recent"][..., -1]

    def drawing(self) -> Drawing:
        """Row of the last k cards in the colours of their suits, of which the agent sees the last alone."""

        def draw(state: State, physics: Physics) -> Picture:
            suits = state["recent"].tolist()
            return cells((1, self.k), [([(0, i)], PALETTE[suit]) for i, suit in enumerate(suits)])

        return Drawing(draw, 4)


def _deal(left: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Suit of a card of those that are left `[*B, 4]`, by uniform noise `[*B]`, and the cards left after it."""
    below = left.cumsum(-1)
    card = (noise * below[..., -1]).long()
    suit = (below <= card.unsqueeze(-1)).sum(-1)
    dealt = torch.arange(_SUITS, device=left.device) == suit.unsqueeze(-1)
    return suit, left - dealt.long()

"""Pictures among features: the default network of a space for observations that were encoded and normalised before."""

from __future__ import annotations

import gymnasium as gym
import torch
from torch import Tensor

from rlmeta.nn.block import Block, Context, Params, with_learner_axes
from rlmeta.nn.encoder import Encoder, space_leaves
from rlmeta.nn.initialisers import Initialiser
from rlmeta.nn.lift import Sequential, lift
from rlmeta.nn.linear import ActivationName
from rlmeta.nn.mlp import MLP
from rlmeta.nn.pictures import picture_cnn


class FeaturePictures(Block):
    """Convolutions of the pictures within the features of a plain `Encoder`, `[*L, ..., D]` to `[*L, ..., D']`.

    For learners that normalise features, or join them to others, before their network: every picture of the space
    passes `picture_cnn`, and all other features, those that follow the observation's too, stay as they are. The
    networks have the names that those of `Encoder(space, choose=picture_cnn)` have.
    """

    features: int
    """D', the number of features."""

    def __init__(
        self, observation_space: gym.Space, following: int = 0, *, initialiser: Initialiser = "orthogonal"
    ) -> None:
        """Create the block.

        Args:
            observation_space: of the encoder.
            following: number of features after those of the observation.
            initialiser: of the convolutional networks.
        """
        super().__init__()
        self._parts: list[tuple[int, tuple[int, ...], str]] = []
        self.features = following
        for index, (_, space) in enumerate(space_leaves(observation_space)):
            size, shape = Encoder(space).features, tuple(space.shape or ())
            network = picture_cnn(space, initialiser)
            if network is not None:
                self.add_module(str(index), lift(network, len(shape)))
            self._parts.append((size, shape, "" if network is None else str(index)))
            self.features += size if network is None else int(network[-2].out_features)  # type: ignore[arg-type]
        self._sizes = [size for size, _, _ in self._parts] + [following]

    def run(self, params: Params, x: Tensor, ctx: Context, prefix: str = "") -> Tensor:
        """Pass the pictures within `x` `[*L, ..., D]` through their networks."""
        ctx = with_learner_axes(self, params, ctx, prefix)
        pieces = list(torch.split(x, self._sizes, -1))
        for i, (_, shape, name) in enumerate(self._parts):
            if name:
                block: Block = self._modules[name]  # type: ignore[assignment]
                pieces[i] = block.run(params, pieces[i].reshape(*x.shape[:-1], *shape), ctx, f"{prefix}{name}.")
        return torch.cat(pieces, -1)


def feature_network(
    observation_space: gym.Space,
    hidden_sizes: tuple[int, ...],
    outputs: int,
    *,
    following: int = 0,
    activation: ActivationName = "tanh",
) -> Block:
    """Build the default network of features: a multi-layer perceptron, after convolutions where the space has pictures.

    Args:
        observation_space: of the plain `Encoder` whose features it is given.
        hidden_sizes: of the perceptron.
        outputs: of the perceptron.
        following: number of features after those of the observation.
        activation: of the perceptron.
    """
    pictures = FeaturePictures(observation_space, following)
    perceptron = MLP(pictures.features, hidden_sizes, outputs, activation=activation)
    return Sequential(pictures, perceptron) if pictures._modules else perceptron

"""Networks of agents: a body from observations to features (the default, or the user's), then a head."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from rlmeta.agents.recurrence import RecurrentBody, memory_block, seen_features
from rlmeta.data.spaces import to_tree
from rlmeta.errors import SettingError, SpaceError
from rlmeta.functional import tree
from rlmeta.functional.tree import Tree
from rlmeta.nn import (
    MLP,
    ActivationName,
    Block,
    CategoricalHead,
    CategoricalQHead,
    Context,
    Encoder,
    Initialiser,
    MultiDiscreteHead,
    Params,
    QHead,
    QuantileQHead,
    Sequential,
    ValueHead,
    check_block,
    feature_axes,
    head_for,
    lift,
    picture_cnn,
)
from rlmeta.nn.block import alone
from rlmeta.nn.encoder import ACTION_MASK, byte_bound
from rlmeta.nn.lifted import copied, recordable


class Network(Block):
    """Network of an agent: a body, then a head. Weights are named `body.*` and `head.*`.

    A multi-head network has a last layer for each of K `tasks`, selected by the one-hot vector of K entries at the end
    of an observation: the head is given K * D features, those of the current task in its block and zeros in the others.
    So a new task begins with an undecided policy, and does not write into the last layer of an old one.
    """

    def __init__(self, body: Block, head: Block, features: int, tasks: int = 0) -> None:
        super().__init__()
        self.body, self.head, self.features, self.tasks = body, head, features, tasks

    def run(self, params: Params, x: Tree, ctx: Context, prefix: str = "") -> Any:
        """Forward pass from observations `[*L, ...]` to the output of the head.

        A Dict observation's `action_mask` `[*L, ..., A]` closes the actions where it is 0; one that is 0 everywhere
        closes none.
        """
        return self.answer(params, self.body.run(params, x, ctx, f"{prefix}body."), x, ctx, prefix)

    def answer(self, params: Params, features: Tensor, x: Tree, ctx: Context, prefix: str = "") -> Any:
        """Output of the head for features `[*L, ..., D]` of the observations `x`."""
        head, name, features = self.head, f"{prefix}head.", self.placed(features, x)
        if isinstance(self.body, RecurrentBody):
            x = x["observation"]
        if not isinstance(x, dict) or ACTION_MASK not in x or isinstance(head, ValueHead):
            return head.run(params, features, ctx, name)
        assert isinstance(head, CategoricalHead | MultiDiscreteHead | QHead | CategoricalQHead | QuantileQHead)
        return head.run(params, features, ctx, name, x[ACTION_MASK])

    def placed(self, features: Tensor, x: Tree) -> Tensor:
        """Input features of the head: `[*L, ..., D]`, of a multi-head network `[*L, ..., K * D]`, zero elsewhere."""
        if not self.tasks:
            return features
        observation: Tensor = x["observation"] if isinstance(self.body, RecurrentBody) else x
        task = observation[..., -self.tasks :].to(features.dtype)
        return (task.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2)


def _places(observation_space: gym.Space, tasks: int) -> int:
    """Number of last layers of a head: `tasks`, or 1 if that is 0.

    Raises:
        SettingError: observations do not end with a one-hot vector of the task.
    """
    if not tasks:
        return 1
    low = high = np.empty(0)
    if isinstance(observation_space, gym.spaces.Box) and len(observation_space.shape) == 1:
        low, high = observation_space.low, observation_space.high
    if len(low) < tasks or (low[-tasks:] != 0).any() or (high[-tasks:] != 1).any():
        raise SettingError(
            f"task_heads is {tasks}, but observations of {observation_space} do not end with a one-hot vector of "
            f"{tasks} tasks: train on a stream with observe_identity and as many tasks, or leave task_heads 0"
        )
    return tasks


def with_memory(settings: Any, body: Block, features: int, action_space: gym.Space | None) -> tuple[Block, int]:
    """Add a memory to a body if the settings ask for one; returns the body and its number of features."""
    if action_space is None or getattr(settings, "memory", "none") == "none":
        return body, features
    memory = memory_block(settings, features + seen_features(settings.sees, action_space))
    return RecurrentBody(body, memory), memory.features


def check_mask(observation_space: gym.Space, action_space: gym.Space) -> None:
    """Refuse an `action_mask` in the observations that no head could obey: it would be left out without a word.

    Raises:
        SpaceError: it lies deeper than in the outermost Dict, the actions can't be masked, or it has another size.
    """
    if not isinstance(observation_space, gym.spaces.Dict | gym.spaces.Tuple):
        return
    if _hides_mask(observation_space, outermost=True):
        raise SpaceError(
            f"{ACTION_MASK} lies within another part of {observation_space}: move it into the outermost Dict"
        )
    if not isinstance(observation_space, gym.spaces.Dict) or ACTION_MASK not in observation_space.spaces:
        return
    mask = observation_space.spaces[ACTION_MASK]
    if isinstance(action_space, gym.spaces.Discrete):
        expected = (int(action_space.n),)
    elif isinstance(action_space, gym.spaces.MultiDiscrete):
        expected = (int(action_space.nvec.sum()),)
    else:
        raise SpaceError(
            f"{ACTION_MASK} is for Discrete and MultiDiscrete actions, the task has {action_space}: drop it"
        )
    if mask.shape != expected:
        raise SpaceError(
            f"{ACTION_MASK} is {mask}, expected the shape {expected}: one entry for every action of {action_space}"
        )


def _hides_mask(space: gym.Space, outermost: bool = False) -> bool:
    """Whether a Dict below the outermost one has an `action_mask`."""
    if isinstance(space, gym.spaces.Dict):
        inner = any(_hides_mask(child) for child in space.spaces.values())
        return inner or (not outermost and ACTION_MASK in space.spaces)
    return isinstance(space, gym.spaces.Tuple) and any(_hides_mask(child) for child in space.spaces)


def build_body(
    network: Callable[[gym.Space], nn.Module] | None,
    observation_space: gym.Space,
    hidden_sizes: tuple[int, ...],
    activation: ActivationName,
    initialiser: Initialiser,
    whitened: bool = False,
) -> tuple[Block, int]:
    """Build the body and its number of features: the user's network, or an encoder and a multi-layer perceptron.

    The encoder is chosen by the space: pictures pass convolutions (`nn.picture_cnn`), the rest is a vector of numbers.

    Args:
        network: function that builds the user's network, None for the default.
        observation_space: of one environment.
        hidden_sizes: of the default network.
        activation: of the default network.
        initialiser: of the default network.
        whitened: observations come as floats, normalised by running statistics.
    """
    if network is None:
        encoder = Encoder(observation_space, choose=partial(picture_cnn, initialiser=initialiser))
        if not hidden_sizes:
            return encoder, encoder.features
        mlp = MLP(encoder.features, hidden_sizes, activation=activation, initialiser=initialiser)
        return Sequential(encoder, mlp), hidden_sizes[-1]
    module = _own_module(network, observation_space)
    features = _features_of(module, observation_space, whitened)  # first, since it gives a lazy layer its shape
    return lift(module, feature_axes(observation_space)), features


def _own_module(network: Callable[[gym.Space], nn.Module], observation_space: gym.Space) -> nn.Module:
    """Build the user's network, in float32."""
    expected = "expected a function from an observation space to an nn.Module"
    if isinstance(network, nn.Module):
        name = type(network).__name__
        raise SettingError(f"network= is a {name} itself, {expected}: lambda space: {name}(...)")
    if not callable(network):
        raise SettingError(f"network= is {network!r}, {expected}")
    module = network(observation_space)
    if not isinstance(module, nn.Module):
        raise SettingError(f"network= gave a {type(module).__name__}, {expected}")
    if torch.get_default_dtype() != torch.float32:
        module = copied(module).to(torch.float32)  # as everything that it will meet
    return module


def policy_network(
    settings: Any,
    observation_space: gym.Space,
    action_space: gym.Space,
    *,
    state_dependent: bool = False,
    tasks: int = 0,
) -> Network:
    """Build a policy network: the parameters of a distribution over actions; its last layer starts near 0.

    Args:
        settings: the agent's.
        observation_space: of one environment.
        action_space: of one environment.
        state_dependent: noise that depends on the features.
        tasks: number of last layers of a multi-head network, see `Network`; 0 for a single one.
    """
    check_mask(observation_space, action_space)
    body, features = build_body(
        settings.network,
        observation_space,
        settings.hidden_sizes,
        settings.activation,
        "orthogonal",
        whitens(settings),
    )
    body, features = with_memory(settings, body, features, action_space)
    features *= _places(observation_space, tasks)
    head = head_for(
        action_space,
        features,
        initial_scale=0.01,
        initial_log_std=settings.initial_log_std,
        action_bounds=settings.action_bounds,
        state_dependent_noise=state_dependent,
    )
    return Network(body, head, features, tasks)


def value_network(
    settings: Any, observation_space: gym.Space, action_space: gym.Space | None = None, *, tasks: int = 0
) -> Network:
    """Build a value network: the value of an observation; `tasks` as in `policy_network`.

    It has a memory, where the settings ask for one, only if it is given the action space: the last action is an input.
    """
    body, features = build_body(
        settings.network,
        observation_space,
        settings.hidden_sizes,
        settings.activation,
        "orthogonal",
        whitens(settings),
    )
    body, features = with_memory(settings, body, features, action_space)
    features *= _places(observation_space, tasks)
    return Network(body, ValueHead(features), features, tasks)


def q_network(
    settings: Any,
    observation_space: gym.Space,
    action_space: gym.Space,
    head: Callable[[int, int], Block] = QHead,
) -> Network:
    """Build a Q-network: the value of every action, or the distribution of its return; masked ones are minus infinity.

    Args:
        settings: the agent's.
        observation_space: of one environment.
        action_space: of one environment.
        head: function from the numbers of features and actions to the head.
    """
    if not isinstance(action_space, gym.spaces.Discrete):
        raise SpaceError(f"a value for every action needs Discrete actions, the task has {action_space}")
    check_mask(observation_space, action_space)
    s = settings
    body, features = build_body(s.network, observation_space, s.hidden_sizes, s.activation, "torch", whitens(s))
    body, features = with_memory(s, body, features, action_space)
    return Network(body, head(features, int(action_space.n)), features)


# ---------------------------------------------------------------------- a user's network


def whitens(settings: Any) -> bool:
    """Whether observations reach the networks as floats, normalised by running statistics."""
    return bool(getattr(settings, "normalise_observation", False))


def check_network(settings: Any, observation_space: gym.Space, *, rows: bool, key: Tensor | None = None) -> bool:
    """Refuse a user's network that is no function of its observations, before anything is trained or written.

    Args:
        settings: of the learner, which may have a `network`.
        observation_space: of one environment.
        rows: whether each row's features must depend on that row alone; False lets batch normalisation without running
            statistics take those of the batch, whatever it is evaluated on.
        key: what the learner's training draws from, None if it has nothing.

    Returns:
        Whether the networks depend on tensors alone, so that it may be recorded (`nn.lifted.recordable`).

    Raises:
        SettingError: with the reason.
    """
    network = getattr(settings, "network", None)
    if network is None:
        if not whitens(settings):
            _warn_of_pictures(observation_space)
        return True
    with alone, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        own = _own_module(network, observation_space)
        module = copied(own)
        whitened = whitens(settings)
        _features_of(module, observation_space, whitened)
        if not rows:
            _keep_statistics(module)
        x, other = (_observations(observation_space, 4, whitened, seed) for seed in range(2))
        try:
            check_block(lift(module, feature_axes(observation_space)), x, other, key=key)
        except SettingError as error:
            raise SettingError(f"network= ({type(module).__name__}) can't be trained: {error}") from None
    return recordable(own)


def _warn_of_pictures(space: gym.Space) -> None:
    """Warn if pictures reach the default network unscaled, in numbers of hundreds that saturate its activations."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        for part in space.spaces.values() if isinstance(space, gym.spaces.Dict) else space.spaces:
            _warn_of_pictures(part)
    elif isinstance(space, gym.spaces.Box) and len(space.shape) > 1 and byte_bound(space) is None:
        largest = float(np.abs(space.high).max(initial=0.0))
        if 100.0 < largest < 1e6:
            warnings.warn(
                f"observations of {space} reach the network as they are, up to {largest:g}: only pictures of bytes "
                "(uint8) are divided by their bound; declare them as such, or scale them by a wrapper or "
                "normalise_observation=True",
                RuntimeWarning,
                stacklevel=2,
            )


def _keep_statistics(module: nn.Module) -> None:
    """Enable running statistics in batch normalisation, so that it does not mix rows in evaluation."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is None:
            part.track_running_stats = True
            part.running_mean = torch.zeros(part.num_features, dtype=torch.float32)
            part.running_var = torch.ones_like(part.running_mean)
            part.num_batches_tracked = torch.zeros((), dtype=torch.int64)


def _observations(space: gym.Space, count: int, whitened: bool, seed: int = 0) -> Tree:
    """Sample network inputs `[count, ...]` from an observation space, none of them huge."""
    batch = gym.vector.utils.batch_space(space, count)
    batch.seed(seed)
    drawn: Tree = to_tree(space, batch.sample(), (count,), "the task")
    if whitened:
        generator = torch.Generator().manual_seed(seed)
        return tree.map(lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu"), drawn)
    return tree.map(lambda x: x.clamp(-10.0, 10.0) if x.is_floating_point() else x, drawn)


def zeros_of(space: gym.Space, learners: tuple[int, ...], device: torch.device) -> Tree:
    """Zero observations `[*L, 1, ...]` for the learners `*L`, in the dtypes of a space."""
    row = to_tree(space, gym.vector.utils.batch_space(space, 1).sample(), (1,), "the task")
    return tree.map(lambda x: torch.zeros_like(x, device=device).expand(*learners, *x.shape), row)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Context in which a module is in evaluation mode; afterwards every part is in the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _features_of(module: nn.Module, observation_space: gym.Space, whitened: bool) -> int:
    """Infer the output width of a user's network by a dry run on two observations."""
    observation = _observations(observation_space, 2, whitened)
    try:
        with torch.no_grad(), _evaluated(module):
            features = module(observation)
    except Exception as error:
        shapes = ", ".join(f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in tree.leaves(observation))
        bytes_ = any(leaf.dtype == torch.uint8 for leaf in tree.leaves(observation))
        hint = ". Bytes come as they are: begin with x.float() / 255" if bytes_ else ""
        message = f"{type(error).__name__}: {error}"
        raise SettingError(f"network= fails for two observations, {shapes}: {message}{hint}") from error
    if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[0] != 2 or not features.shape[1]:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise SettingError(f"network= must give features [B, D] for B observations; for B = 2 it gave {shape}")
    if features.dtype != torch.float32:
        raise SettingError(f"network= gave features of {features.dtype}, expected torch.float32: end with .float()")
    if not bool(features.isfinite().all()):
        raise SettingError(
            "network= gave features that are not finite for two observations: look at its first weights and at what "
            "it divides by"
        )
    return int(features.shape[1])

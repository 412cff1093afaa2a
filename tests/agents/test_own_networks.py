"""Networks of one's own: what they must not do is found when the learner is bound, before anything is trained."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rlmeta as rl
from rlmeta.data.samples import DataTask, Samples
from rlmeta.errors import SettingError
from rlmeta.functional import random
from rlmeta.learning.learner import initial_state

STATE = gym.spaces.Box(-1.0, 1.0, (4,))
ACTIONS, CLASSES = gym.spaces.Discrete(2), gym.spaces.Discrete(3)


class Own(nn.Module):
    """Of a function of the batch and itself."""

    def __init__(self, features: Callable[[Any, Tensor], Tensor], kind: Callable[..., nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.layer, self.features, self.memory = kind(4, 6), features, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return self.features(self, x)


def remembering(own: Any, x: Tensor) -> Tensor:
    own.memory = own.memory + x.mean()
    return own.layer(x) + own.memory


MIXING = {
    "rows as time": lambda space: Own(lambda own, x: own.layer(x)[0], nn.LSTM),
    "rows as time, backwards": lambda space: Own(lambda own, x: own.layer(x.flip(0))[0].flip(0), nn.GRU),
    "attention over rows": lambda space: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)),
    "mean of the batch": lambda space: Own(lambda own, x: own.layer(x - x.mean(0))),
}
REPEATING = {
    "memory": lambda space: Own(remembering),
    "another generator": lambda space: Own(lambda own, x: own.layer(x) * np.random.rand()),
    "in training": lambda space: Own(lambda own, x: own.layer(x) * (np.random.rand() if own.training else 1.0)),
}
DRAWING = {
    "dropout": lambda space: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)),
    "functional": lambda space: Own(lambda own, x: nn.functional.dropout(own.layer(x), 0.5, own.training)),
    "noise": lambda space: Own(lambda own, x: own.layer(x) + torch.randn(6)),
}
FINE = {
    "an axis of time": lambda space: Own(lambda own, x: own.layer(x.unsqueeze(0))[0][0], nn.LSTM),
    "running statistics": lambda space: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)),
    "dropout in evaluation": lambda space: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5).eval()),
    "weight norm": lambda space: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
    "lazy": lambda space: nn.Sequential(nn.LazyLinear(6), nn.Tanh()),
}
BATCH_STATISTICS = lambda space: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False))  # noqa: E731

AGENTS = [rl.PPO(), rl.A2C(), rl.REINFORCE(), rl.DQN()]
SUPERVISED = [rl.Classifier(), rl.MAML(rl.Classifier())]


def bound(settings: Any, network: Any) -> Any:
    if isinstance(settings, rl.MAML):
        settings = dataclasses.replace(settings, learner=dataclasses.replace(settings.learner, network=network))
    else:
        settings = dataclasses.replace(settings, network=network)
    return settings.bind(STATE, CLASSES)


@pytest.mark.parametrize("settings", [*AGENTS, *SUPERVISED], ids=lambda s: type(s).__name__)
def test_every_learner_checks_a_network(settings: Any) -> None:
    for kinds, message in ((MIXING, "mixes the rows of its batch"), (REPEATING, "keeps memory between calls or draws")):
        for network in kinds.values():
            with pytest.raises(SettingError, match=f"network= .*{message}"):
                bound(settings, network)
    for network in FINE.values():
        bound(settings, network)
    for kind, network in DRAWING.items():
        if isinstance(settings, rl.Classifier) and kind != "noise":
            bound(settings, network)  # it has a key in training
        else:
            with pytest.raises(SettingError, match=r"draws random numbers in .*leave dropout and noise out"):
                bound(settings, network)
    if settings in AGENTS:  # which act one by one
        with pytest.raises(SettingError, match=r"mixes the rows.*running statistics"):
            bound(settings, BATCH_STATISTICS)
    else:
        bound(settings, BATCH_STATISTICS)


def test_a_check_sees_every_row_of_a_space_of_few_values() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x == x[0]).float().unsqueeze(-1)

    with pytest.raises(SettingError, match="mixes the rows"):
        rl.PPO(network=lambda space: Rows()).bind(gym.spaces.Discrete(2), ACTIONS)


def test_the_modules_that_a_function_gives_stay_as_they_were() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, track_running_stats=False))
    module[1].eval()
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    before = torch.get_rng_state()
    rl.Classifier(network=lambda space: module).bind(STATE, CLASSES)
    assert [part.training for part in module] == [True, False, True]
    assert module[2].running_mean is None
    assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
    assert all(value.device.type == "cpu" for value in module.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Linear(4, 6), "network= is a Linear itself, expected a function .*lambda space: Linear"),
        ("mine", "network=? is 'mine', expected a function"),
        (lambda space: None, "network= gave a NoneType"),
        (lambda space: Own(lambda own, x: own.layer(x.goal)), "fails for two observations.*AttributeError"),
        (lambda space: Own(lambda own, x: own.layer(x) * torch.inf), "features that are not finite"),
        (lambda space: Own(lambda own, x: own.layer(x).double()), r"torch.float64, expected .*end with \.float\(\)"),
        (lambda space: Own(lambda own, x: own.layer(x)[:, :0]), r"must give features \[B, D\]"),
        (lambda space: nn.utils.prune.identity(nn.Linear(4, 6), "weight"), "prune.remove"),
    ],
)
def test_what_is_no_network_is_refused_by_a_sentence(network: Any, message: str) -> None:
    import torch.nn.utils.prune  # noqa: F401

    with pytest.raises(SettingError, match=message):
        rl.PPO(network=network).bind(STATE, ACTIONS)


def test_networks_are_float32_whatever_torchs_default_is() -> None:
    def network(space: gym.Space) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GroupNorm(2, 6))

    torch.set_default_dtype(torch.float64)
    try:
        agent = rl.PPO(network=network, num_envs=2).bind(STATE, ACTIONS)
        state = initial_state(agent.networks, random.make_keys([1, 2]), {})
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = {**state["params"]["weights"], **state["params"]["buffers"]}
    assert {value.dtype for value in tensors.values()} == {torch.float32, torch.int64}
    found = agent.policy.run(tensors, torch.zeros(2, 5, 4), rl.nn.Context(), "policy.")
    assert found["logits"].dtype == torch.float32


# ---------------------------------------------------------------------- bytes


class Echo(gym.Env):
    """The action that equals the observation pays 1."""

    def __init__(self, dtype: Any, high: int = 2) -> None:
        self.observation_space, self.action_space = gym.spaces.Box(0, high, (1,), dtype), gym.spaces.Discrete(3)
        self.factor = high // 2

    def _observation(self) -> np.ndarray:
        self.x = int(self.np_random.integers(3))
        return np.array([self.x * self.factor], self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, self.t = float(action == self.x), self.t + 1
        return self._observation(), reward, False, self.t >= 10, {}


@pytest.mark.parametrize(("high", "normalise"), [(2, False), (2, True), (254, False)])
def test_small_numbers_stored_as_bytes_are_learned_from(high: int, normalise: bool) -> None:
    settings = rl.DQN(
        num_envs=8, learning_starts=100, hidden_sizes=(32,), learning_rate=1e-2, normalise_observation=normalise
    )
    run = rl.train(settings, rl.task(lambda: Echo(np.uint8, high), name="echo"), steps=1200, seeds=2)
    assert (run.scores > 9).all(), run.scores


def test_pictures_that_nothing_scales_are_named() -> None:
    picture = gym.spaces.Dict(picture=gym.spaces.Box(0, 255, (4, 4), np.float32))
    with pytest.warns(RuntimeWarning, match="reach the network as they are, up to 255"):
        rl.PPO().bind(picture, ACTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.PPO(normalise_observation=True).bind(picture["picture"], ACTIONS)
        rl.PPO().bind(gym.spaces.Box(0, 255, (4, 4), np.uint8), ACTIONS)
        rl.PPO().bind(gym.spaces.Box(-np.inf, np.inf, (4, 4)), ACTIONS)


def test_normalised_bytes_are_not_divided_again() -> None:
    space = gym.spaces.Box(0, 255, (2, 2), np.uint8)
    agent = rl.PPO(normalise_observation=True, hidden_sizes=()).bind(space, ACTIONS)
    statistics = {
        "mean": torch.full((2, 2), 100.0, dtype=torch.float64),
        "var": torch.full((2, 2), 400.0, dtype=torch.float64),
        "count": torch.tensor(10.0),
    }
    p = {"normalisers": {"observation": statistics}, "weights": {}, "buffers": {}}
    seen = agent.forward(agent.policy.body, "", p, torch.full((3, 2, 2), 120, dtype=torch.uint8))
    torch.testing.assert_close(seen, torch.ones(3, 4))


def test_a_network_of_ones_own_is_checked_with_what_it_will_see() -> None:
    space = gym.spaces.Box(0, 255, (4,), np.uint8)
    network = lambda space: nn.Linear(4, 6)  # noqa: E731
    rl.PPO(network=network, normalise_observation=True).bind(space, ACTIONS)
    with pytest.raises(SettingError, match="Bytes come as they are"):
        rl.PPO(network=network).bind(space, ACTIONS)


@pytest.mark.parametrize(("largest", "bound"), [(2, 2), (0, 1), (127, 127), (128, 255), (255, 255)])
def test_bytes_of_data_are_divided_by_what_they_can_be(largest: int, bound: int) -> None:
    x = torch.tensor([[0, 0], [0, largest]], dtype=torch.uint8)
    samples = Samples(x, torch.tensor([0, 1]))
    space: Any = DataTask("bytes", samples, samples, (0, 1), 2).world((), 1).observation_space
    assert (space.high == bound).all()


@pytest.mark.parametrize("settings", [*AGENTS, rl.Classifier()], ids=lambda s: type(s).__name__)
def test_a_network_that_writes_to_its_observations_is_refused(settings: Any) -> None:
    with pytest.raises(SettingError, match="writes to its observations in place"):
        bound(settings, lambda space: Own(lambda own, x: own.layer(x.clamp_(min=0))))


def test_an_activation_in_place_computes_the_same_and_leaves_its_input() -> None:
    def network(inplace: bool) -> Callable[[Any], nn.Module]:
        return lambda space: nn.Sequential(nn.ReLU(inplace), nn.Linear(4, 8), nn.ELU(inplace=inplace), nn.Linear(8, 6))

    small = {"num_envs": 2, "num_steps": 16, "batch_size": 32, "num_epochs": 2}
    ends = [rl.train(rl.PPO(network=network(inplace), **small), "CartPole-v1", steps=128) for inplace in (False, True)]
    ours, theirs = (run.state["params"]["weights"] for run in ends)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_forward_of_ones_own_on_a_layer_of_torchs_is_not_recorded() -> None:
    def network(space: Any) -> nn.Module:
        layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        layers[1].forward = lambda x: torch.tanh(x)  # type: ignore[method-assign]
        return layers

    assert bound(rl.PPO(), network).capture is None
    assert bound(rl.PPO(), lambda space: nn.Sequential(nn.Linear(4, 6), nn.Tanh())).capture is not None

"""Parameters with `requires_grad=False` in a user's network stay bit for bit, whatever trains; all others move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rlmeta as rl
from rlmeta.envs.few_shot import FewShot
from rlmeta.errors import CheckpointError, SettingError
from rlmeta.functional import random
from rlmeta.lifelong import AGEM, EWC, GEM, PackNet, Replay
from tests.lifelong.toy import points

SEEDS = 2


def frozen(module):
    return module.requires_grad_(False)


def half(space):
    """A frozen layer, one whose bias alone is frozen, one that is trained; each learner has its own."""
    middle = nn.Linear(6, 6)
    middle.bias.requires_grad_(False)
    return nn.Sequential(frozen(nn.Linear(space.shape[0], 6)), nn.Tanh(), middle, nn.Tanh(), nn.Linear(6, 5), nn.Tanh())


class Images(nn.Module):
    """Run by vmap: a frozen convolution, a norm without its bias, and a frozen table of whole numbers."""

    def __init__(self, size):
        super().__init__()
        self.turn = nn.Parameter(torch.arange(size).flip(0), requires_grad=False)
        self.convolution, self.norm = frozen(nn.Conv1d(1, 4, 2)), nn.GroupNorm(2, 4)
        self.norm.bias.requires_grad_(False)
        self.linear = nn.Linear(4 * (size - 1), 5)

    def forward(self, x):
        x = self.norm(self.convolution(x[..., self.turn].unsqueeze(-2)))
        return torch.tanh(self.linear(x.flatten(-2)))


def lifted(space):
    return Images(space.shape[0])


def kept_and_moved(run):
    """The frozen tensors of a run's networks are what they were, all others are not; the names of the frozen."""
    fresh = run.agent.init(run.experiment.keys(), run.experiment.hyper(), run.experiment.world())["params"]
    found, learner = run.state["params"], getattr(run.agent, "inner", run.agent)
    blocks = nn.ModuleDict(learner.networks())
    stay = {name for name, value in blocks.named_parameters() if not value.requires_grad}
    move = {name for name, value in blocks.named_parameters() if value.requires_grad}
    assert stay and set(found["weights"]) == set(fresh["weights"]) == move
    for name in stay:
        assert torch.equal(found["buffers"][name], fresh["buffers"][name]), name
        assert found["buffers"][name].shape[0] == SEEDS
    for name in move:
        assert (found["weights"][name] != fresh["weights"][name]).flatten(1).any(1).all(), name
    return stay


def trained(settings, problem, steps, **given):
    return rl.train(settings, problem, steps=steps, seeds=SEEDS, progress=False, threads=1, **given)


AGENTS = {
    "ppo": lambda **k: rl.PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=2, **k),
    "ppo, one body": lambda **k: rl.PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=2, share_network=True, **k),
    "a2c": lambda **k: rl.A2C(num_envs=4, num_steps=8, **k),
    "reinforce": lambda **k: rl.REINFORCE(num_envs=4, num_steps=16, **k),
    "dqn": lambda **k: rl.DQN(num_envs=4, learning_starts=32, capacity=400, target_every=2, average_rate=0.1, **k),
}


@pytest.mark.parametrize("network", [half, lifted])
@pytest.mark.parametrize("agent", AGENTS)
def test_agents_leave_frozen_layers(agent, network):
    run = trained(AGENTS[agent](network=network), "CartPole-v1", 256)
    stay = kept_and_moved(run)
    assert len(stay) == (3 if network is half else 4) * (2 if "value.body" in str(sorted(stay)) else 1)
    p = run.state["params"]
    if agent == "dqn":
        for copied in ("target", "average"):
            for name in stay:
                assert torch.equal(p["buffers"][name.replace("q.", f"{copied}.", 1)], p["buffers"][name])
    else:
        assert not torch.equal(p["buffers"][min(stay)][0], p["buffers"][min(stay)][1]) or "turn" in min(stay)


@pytest.mark.parametrize("only", ["policy", "value"])
def test_one_of_policy_and_value_may_be_frozen(only):
    made = []

    def network(space):
        made.append(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
        policy = len(made) % 2 == 0  # the first is tried alone, then come policy and value in turn
        return frozen(made[-1]) if policy == (only == "policy") else made[-1]

    run = trained(AGENTS["ppo"](network=network), "CartPole-v1", 128)
    assert set(run.state["params"]["buffers"]) == {f"{only}.body.0.weight", f"{only}.body.0.bias"}
    kept_and_moved(run)


@pytest.mark.parametrize("imitator", ["cloning", "gail", "warm gail"])
def test_imitators_leave_frozen_layers(imitator):
    shown = rl.record(trained(AGENTS["ppo"](), "CartPole-v1", 64), 2)
    if imitator == "cloning":
        settings = rl.BehaviourCloning(demonstrations=shown, network=half, num_steps=5, weight_decay=0.1)
        kept_and_moved(trained(settings, "CartPole-v1", 10))
        return
    steps = {"num_envs": 4, "num_steps": 16, "batch_size": 32, "num_epochs": 1}
    warm = {"warm_start": 5} if imitator == "warm gail" else {}
    kept_and_moved(trained(rl.GAIL(demonstrations=shown, network=half, **steps, **warm), "CartPole-v1", 128))


def test_inverse_reinforcement_learning_leaves_a_frozen_layer():
    shown = rl.record(trained(rl.A2C(), "GridWorld-v0", 40), 3)

    def network(space):
        return nn.Sequential(frozen(nn.Embedding(int(space.n), 4)), nn.Linear(4, 3), nn.Tanh())

    kept_and_moved(trained(rl.IRL(demonstrations=shown, network=network), "GridWorld-v0", 5))


def test_statistics_move_under_a_norm_whose_weights_are_frozen():
    def network(space):
        return nn.Sequential(frozen(nn.BatchNorm1d(4)), nn.Linear(4, 5), nn.Tanh())

    run = trained(rl.Classifier(network=network, batch_size=8, num_steps=5), points(2), 40)
    buffers = run.state["params"]["buffers"]
    assert (buffers["net.0.0.weight"] == 1).all() and (buffers["net.0.0.bias"] == 0).all()
    assert (buffers["net.0.0.running_mean"] != 0).all()


METHODS = {
    "none": (),
    "ewc": (EWC(strength=10.0, samples=20),),
    "gem": (GEM(memory=10, margin=0.5),),
    "agem": (AGEM(memory=10, batch_size=5),),
    "packnet": (PackNet(),),
    "replay": (Replay(size=20),),
}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_no_lifelong_method_touches_frozen_layers(method, optimizer):
    decays = {"weight_decay": 0.1, "learning_rate": 0.01, "max_grad_norm": 1.0, "optimizer": optimizer}
    settings = rl.Classifier(network=half, batch_size=8, num_steps=5, **decays)
    run = trained(settings, points(2), 80, lifelong=METHODS[method])
    kept_and_moved(run)
    weights = sum(w[0].numel() for w in run.state["params"]["weights"].values())
    sizes = {name: leaf.shape for name, leaf in run.state["optimizer"]["all"].items() if hasattr(leaf, "shape")}
    assert all(shape[-1] == weights for shape in sizes.values() if len(shape) == 2)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("network", [half, lifted])
def test_maml_adapts_and_learns_around_frozen_layers(network, first_order):
    x = random.normal(random.make_keys([0])[0], "points", 0, (60, 4))
    classes = {"train": range(5), "validation": range(5, 7), "test": range(7, 10)}
    problem = FewShot(x, torch.arange(60) // 6, classes, 2, 1, 2)
    inner = rl.Classifier(network=network)
    run = trained(rl.MAML(inner, num_envs=4, inner_steps=2, inner_rate=0.1, first_order=first_order), problem, 40)
    kept_and_moved(run)
    agent, p = run.agent, run.agent.effective_params(run.state)
    tasks = run.world.tasks(run.state["key"], 0, 3, "test")
    before = agent.start(p, 3)
    after = agent.adapted(before, tasks["support"], 2, "none")
    assert set(after["weights"]) == set(run.state["params"]["weights"])
    assert all(not torch.equal(after["weights"][n], before["weights"][n]) for n in after["weights"])
    assert all(torch.equal(after["buffers"][n], before["buffers"][n]) for n in after["buffers"])


def test_a_frozen_network_that_is_shared_serves_every_place():
    """Pre-trained features that the factory does not copy: the same in policy, value and every learner."""
    features = frozen(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6)))
    before = copy.deepcopy(features.state_dict())

    def network(space):
        return nn.Sequential(features, nn.Linear(6, 5), nn.Tanh())

    run = trained(AGENTS["ppo"](network=network), "CartPole-v1", 128)
    for place in ("policy", "value"):
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            found = run.state["params"]["buffers"][f"{place}.body.0.{name}"]
            assert torch.equal(found, before[name].expand_as(found))
    repeated = frozen(nn.Linear(4, 4))
    run = trained(rl.A2C(network=lambda space: nn.Sequential(repeated, nn.Tanh(), repeated)), "CartPole-v1", 128)
    assert torch.equal(run.state["params"]["buffers"]["policy.body.2.weight"][0], repeated.weight)


def test_layers_that_are_one_in_two_networks_are_refused_where_they_are_trained():
    one = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    with pytest.raises(SettingError, match=r"policy.body.0.weight and value.body.0.weight are one tensor"):
        trained(AGENTS["ppo"](network=lambda space: one), "CartPole-v1", 128)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    kept = trained(AGENTS["ppo"](network=lambda space: Tied()), "CartPole-v1", 128)
    assert "policy.body.first.weight" in kept.state["params"]["weights"]
    assert "policy.body.second.weight" not in kept.state["params"]["weights"]


def test_learners_that_freeze_other_layers_are_refused(tmp_path):
    made = []

    def network(space):
        made.append(nn.Linear(4, 5))
        return made[-1].requires_grad_(len(made) % 2 == 0)

    with pytest.raises(SettingError, match=r"q.body.bias, q.body.weight: frozen .* in the network of one learner"):
        trained(AGENTS["dqn"](network=network), "CartPole-v1", 64, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_goes_back_into_the_same_layers_alone(tmp_path):
    run = trained(AGENTS["a2c"](network=half), "CartPole-v1", 128, out=tmp_path / "run")
    again = rl.load(tmp_path / "run", network=half)
    for part in ("weights", "buffers"):
        for name, value in run.state["params"][part].items():
            assert torch.equal(again.state["params"][part][name], value)

    def thawed(space):
        return half(space).requires_grad_(True)

    thawed.__qualname__ = "half"  # another name alone is refused
    with pytest.raises(CheckpointError, match=r"was frozen .* and is trained"):
        rl.load(tmp_path / "run", network=thawed)

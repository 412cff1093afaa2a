"""A trained network as an ordinary module gives what the run gives, exported too."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlmeta as rl
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.functional import tree
from tests.agents.worlds import Target

SMALL = {"num_envs": 2, "num_steps": 16, "hidden_sizes": (8,)}
BUDGET = rl.Budget(steps=128, eval_every=1000, final_episodes=2)


class Many(gym.Env):
    """A Dict observation with a mask, an angle and a whole number that does not count from 0; actions from 3 on."""

    action_space = gym.spaces.Discrete(4, start=3)
    observation_space = gym.spaces.Dict(
        {
            "b": gym.spaces.Box(-1, 1, (2,), np.float64),
            "a": gym.spaces.Discrete(3, start=-1),
            "action_mask": gym.spaces.MultiBinary(4),
        }
    )

    def seen(self):
        mask = np.zeros(4, np.int8)
        mask[[self.t % 4, (self.t + 1) % 4]] = 1
        return {"b": self.np_random.uniform(-1, 1, 2), "a": self.t % 3 - 1, "action_mask": mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.seen(), {}

    def step(self, action):
        self.t += 1
        return self.seen(), float(action), False, self.t == 8, {}


class Pixels(gym.Env):
    """Bytes, and an action with bounds."""

    action_space = gym.spaces.Box(-0.01, 0.02, (2,), np.float32)
    observation_space = gym.spaces.Box(0, 255, (4, 4, 1), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.integers(0, 256, (4, 4, 1), np.uint8), {}

    def step(self, action):
        self.t += 1
        return self.np_random.integers(0, 256, (4, 4, 1), np.uint8), float(action.sum()), False, self.t == 8, {}


AGENTS = {
    "ppo-discrete": (rl.PPO(batch_size=16, **SMALL), "CartPole-v1"),
    "ppo-normalised": (rl.PPO(batch_size=16, normalise_observation=True, **SMALL), "CartPole-v1"),
    "ppo-shared-box": (rl.PPO(batch_size=16, share_network=True, **SMALL), "Pendulum-v1"),
    "ppo-masked-dict": (rl.PPO(batch_size=16, **SMALL), rl.task(Many, name="many")),
    "a2c-bytes": (rl.A2C(**SMALL), rl.task(Pixels, name="pixels")),
    "a2c-tabular": (rl.A2C(**SMALL), "FrozenLake-v1"),
    "dqn": (rl.DQN(learning_starts=16, batch_size=8, **SMALL), "CartPole-v1"),
    "dqn-averaged-masked": (
        rl.DQN(learning_starts=16, batch_size=8, average_rate=0.5, **SMALL),
        rl.task(Many, name="many"),
    ),
    "own": (rl.A2C(**SMALL), rl.task(partial(Target, "box"), name="own")),
    "binary": (rl.A2C(**SMALL), rl.task(partial(Target, "multibinary"), name="binary")),
    "sac": (rl.SAC(capacity=400, learning_starts=100, hidden_sizes=(8,)), "Pendulum-v1"),
    "td3": (rl.TD3(capacity=400, learning_starts=100, hidden_sizes=(8,)), "Pendulum-v1"),
}
BUILT = "own network"
AGENTS[BUILT] = (rl.A2C(network=lambda space: torch.nn.Linear(4, 6), **SMALL), "CartPole-v1")


def played(run, count: int = 12):
    """Observations that an environment shows, and what the run's second learner does."""
    problem = run.experiment.problem
    source = problem.source if not isinstance(problem.source, str) else None
    env = source() if callable(source) and not problem.native else gym.make(problem.name)
    observation, _ = env.reset(seed=5)
    seen, actions = [], []
    for _ in range(count):
        seen.append(observation)
        actions.append(run.act(observation, deterministic=True, learner=1))
        observation, _, terminated, truncated, _ = env.step(actions[-1])
        if terminated or truncated:
            observation, _ = env.reset()
    return env.observation_space, seen, actions


def batched(space, seen):
    """Plain observations one behind the other, as tensors."""
    if isinstance(space, gym.spaces.Dict):
        return {name: batched(part, [one[name] for one in seen]) for name, part in space.spaces.items()}
    return torch.as_tensor(np.stack([np.asarray(one) for one in seen]))


@pytest.mark.parametrize("name", AGENTS)
def test_the_module_does_what_the_run_does(name):
    settings, problem = AGENTS[name]
    run = rl.train(settings, problem, seeds=2, budget=BUDGET, threads=1)
    space, seen, actions = played(run)
    observation = batched(space, seen)
    module = run.module(1)
    expected = torch.as_tensor(np.stack([np.asarray(one) for one in actions]))
    torch.testing.assert_close(module(observation), expected, rtol=1e-5, atol=1e-6)
    assert module.name == "action" and run.module(1, "action")(observation).equal(module(observation))
    one, other = (next(run.module(i).parameters()) for i in (0, 1))
    assert not torch.equal(one, other)
    found = run.module(1, "q" if name.startswith("dqn") else "policy")(observation)
    if isinstance(found, dict):
        assert found["mean"].shape == found["log_std"].shape
    elif isinstance(run.world.action_space, gym.spaces.Discrete):
        start = int(run.world.action_space.start)
        assert (found.argmax(-1) + start).equal(expected)


def test_the_value_is_of_normalised_observations_and_the_modules_tensors_are_its_own():
    run = rl.train(AGENTS["ppo-normalised"][0], "CartPole-v1", seeds=2, budget=BUDGET, threads=1)
    x = torch.randn(5, 4)
    module = run.module(0, "value")
    stats = {n: leaf[0] for n, leaf in run.state["params"]["normalisers"]["observation"].items()}
    whitened = ((x - stats["mean"]) / (stats["var"] + 1e-8).sqrt()).clamp(-10, 10)
    weights = [leaf[0] for n, leaf in run.state["params"]["weights"].items() if n.startswith("value.")]
    (w1, b1), (w2, b2) = ((w, b) for w, b in zip(weights[::2], weights[1::2]))
    hidden = (whitened.float() @ w1.mT + b1).tanh() @ w2.mT + b2
    torch.testing.assert_close(module(x), hidden.squeeze(-1), rtol=1e-5, atol=1e-6)
    before = module(x)
    run.state["params"]["weights"].flat.zero_()
    assert module(x).equal(before)
    assert sum(p.numel() for p in module.parameters()) == run.state["params"]["weights"].flat.shape[-1]


def test_what_predicts_has_a_module_and_what_has_no_network_of_observations_says_so():
    run = rl.train(rl.Classifier(hidden_sizes=(8,)), rl.stream("split-digits")[0], steps=640, seeds=2, threads=1)
    data = run.experiment.problem.test
    predicted = run.module(1)(data.observation).argmax(-1)
    assert float((predicted == data.target).double().mean()) == pytest.approx(float(run.scores[1]), abs=1e-9)
    meta = rl.train(rl.MAML(num_envs=2), "sinusoid", seeds=1, steps=4, threads=1)
    x = torch.randn(7, 1)
    p = {
        part: {n: v[0] for n, v in meta.agent.effective_params(meta.state)[part].items()}
        for part in ("weights", "buffers")
    }
    assert meta.module()(x).equal(meta.agent.inner.output(p, {"observation": x}))
    optimizer = rl.train(rl.LearnedOptimizer(num_envs=2), "quadratics", seeds=1, steps=40, threads=1)
    with pytest.raises(SettingError, match="has no network of observations"):
        optimizer.module()
    with pytest.raises(UnknownNameError, match="unknown network 'polcy': did you mean policy"):
        rl.train(AGENTS["ppo-discrete"][0], "CartPole-v1", budget=BUDGET, threads=1).module(0, "polcy")


@pytest.mark.parametrize("name", ["ppo-normalised", "ppo-masked-dict", "dqn"])
def test_an_exported_module_gives_the_trained_numbers(name):
    settings, problem = AGENTS[name]
    run = rl.train(settings, problem, seeds=2, budget=BUDGET, threads=1)
    space, seen, _ = played(run, 6)
    observation = batched(space, seen)
    batch = {0: torch.export.Dim("batch")}
    free = dict.fromkeys(observation, batch) if isinstance(observation, dict) else batch
    many = tree.map(lambda x: x.repeat(400, *[1] * (x.dim() - 1))[:2000], observation)
    for part in (None, "q" if name == "dqn" else "policy"):
        module = run.module(1, part)
        program = torch.export.export(module, (observation,), dynamic_shapes=(free,)).module()
        for rows in (observation, many, tree.map(lambda x: x[:1], observation)):
            torch.testing.assert_close(program(rows), module(rows), rtol=1e-5, atol=1e-6)


def test_onnx_gives_the_trained_numbers_for_any_batch(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    run = rl.train(AGENTS["ppo-normalised"][0], "CartPole-v1", seeds=2, budget=BUDGET, threads=1)
    module, path = run.module(1, "policy"), str(tmp_path / "policy.onnx")
    free = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(module, (torch.randn(3, 4),), path, dynamo=True, dynamic_shapes=free)
    session = runtime.InferenceSession(path)
    for rows in (3, 2000):
        x = torch.randn(rows, 4)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ppo-masked-dict", "a2c-bytes", "sac", BUILT])
def test_a_module_can_be_saved_and_read_back(name, tmp_path):
    settings, problem = AGENTS[name]
    run = rl.train(settings, problem, seeds=2, budget=BUDGET, threads=1)
    space, seen, _ = played(run, 6)
    observation, module = batched(space, seen), run.module(1)
    torch.save(module, tmp_path / "policy.pt")
    again = torch.load(tmp_path / "policy.pt", weights_only=False)
    assert again(observation).equal(module(observation)) and not again.training
    assert run.agent.capture is not None or name == BUILT, "what the module leaves out is still the run's"
    assert run.agent.settings == settings


def test_a_module_of_an_own_network_is_built_once_and_draws_nothing():
    calls = []

    def network(space):
        calls.append(1)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(inplace=True))

    settings = rl.PPO(num_envs=2, num_steps=8, batch_size=16, num_epochs=1, network=network)
    module = rl.train(settings, "CartPole-v1", steps=16, final_episodes=2, threads=1).module()
    before, generator = len(calls), torch.get_rng_state()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    expected = module(x)
    assert len(calls) == before and torch.equal(generator, torch.get_rng_state()) and torch.equal(x, kept)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), expected)


@pytest.mark.parametrize("agent", ["SAC", "TD3"])
def test_critics_of_actions_are_no_modules_of_observations(agent):
    settings = getattr(rl, agent)(capacity=400, learning_starts=100, hidden_sizes=(8,))
    run = rl.train(settings, "Pendulum-v1", steps=128, final_episodes=2, threads=1)
    assert run.module()(torch.randn(5, 3)).shape == (5, 1)
    with pytest.raises(rl.RlmetaError, match="expected one of action, policy"):
        run.module(name="q")
    with pytest.raises(rl.RlmetaError, match="holds NaN"):
        run.act(np.full(3, np.nan, np.float32))
    with pytest.raises(rl.RlmetaError, match=r"has the shape \[4\] and dtype float32, expected \[3\], or \[B, 3\]"):
        run.act(np.zeros(4, np.float32))


def test_a_classifier_is_told_apart_from_what_acts():
    run = rl.train(rl.Classifier(hidden_sizes=(8,)), "split-digits", steps=32, threads=1)
    with pytest.raises(rl.RlmetaError, match=r"does not act: run.module\(\) predicts"):
        run.act(np.zeros(64, np.float32))

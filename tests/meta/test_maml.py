"""MAML as a learner: its losses are the adapted losses of any inner learner, whatever that is."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import rlmeta as rl
from rlmeta.agents import A2C, PPO, REINFORCE
from rlmeta.envs.families import NamedFamily
from rlmeta.envs.few_shot import FewShot
from rlmeta.envs.native import Bandit
from rlmeta.envs.regression import Sinusoid
from rlmeta.envs.task import Task, TaskFamily
from rlmeta.errors import SettingError
from rlmeta.functional import random, tree
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.settings import hyper_tensors
from rlmeta.meta.maml import MAML
from rlmeta.nn import Encoder
from rlmeta.supervised import Classifier, Regressor

S = K = 3
SMALL = Regressor(hidden_sizes=(4,), activation="tanh")


def images():
    x = random.normal(random.make_keys([0])[0], "images", 0, (60, 2, 2))
    return FewShot(
        x, torch.arange(60) // 6, {"train": range(5), "validation": range(5, 7), "test": range(7, 10)}, 2, 1, 2
    )


NAVIGATION = NamedFamily("navigation", rl.family("navigation-short"))
PROBLEMS: dict[str, tuple[Any, Any]] = {
    "regressor": (SMALL, NamedFamily("sinusoid", Sinusoid(shots=4, queries=3))),
    "classifier": (Classifier(hidden_sizes=(4,), activation="tanh"), NamedFamily("images", images())),
    "reinforce": (REINFORCE(num_envs=4, num_steps=20, baseline="batch", hidden_sizes=(4,)), NAVIGATION),
    "ppo": (PPO(num_envs=4, num_steps=20, batch_size=80, hidden_sizes=(4,)), NAVIGATION),
    "with a gru": (REINFORCE(num_envs=2, num_steps=4, hidden_sizes=(4,), memory="gru", memory_size=3), NAVIGATION),
    "with an lstm": (A2C(num_envs=2, num_steps=4, hidden_sizes=(4,), memory="lstm", memory_size=3), NAVIGATION),
    "with attention": (
        PPO(
            num_envs=2,
            num_steps=4,
            batch_size=8,
            hidden_sizes=(4,),
            memory="attention",
            memory_size=4,
            attention_heads=2,
            context=2,
        ),
        NAVIGATION,
    ),
}


def bound(name, seeds=range(S), double=True, **settings):
    inner, problem = PROBLEMS[name]
    maml = MAML(**{"learner": inner, "num_envs": K, "inner_rate": 0.1, "inner_steps": 2, **settings})
    world = problem.world((len(seeds),), K)
    with mock.patch.object(Encoder.__init__, "__defaults__", (torch.float64 if double else torch.float32,)):
        learner = maml.bind(world.observation_space, world.action_space)
    learner.capture = learner.inner.capture = None
    state = learner.init(random.make_keys(seeds), hyper_tensors([maml], len(seeds)), world)
    if double:
        state["params"] = doubled(state["params"])
    return learner, state, world


def doubled(part):
    return tree.map(lambda x: x.double() if x.is_floating_point() else x, part)


def batch_of(learner, state, world):
    tasks = world.tasks(state["key"], 0, K, "train")
    return doubled(learner.experience(state, world, tasks)[0] if learner.inner.acts else tasks)


def gradient(learner, p, batch):
    leaves = {n: w.detach().clone().requires_grad_() for n, w in p["weights"].items()}
    loss = learner.losses({**p, "weights": leaves}, batch, StepContext(training=True, report=False))["query"]
    found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, found))


@pytest.mark.parametrize("name", ["regressor", "classifier", "ppo"])
def test_the_meta_gradient_is_that_of_the_loss(name):
    """Finite differences; of PPO's surrogate without adaptation, since its ratios hide what they differentiate."""
    learner, state, world = bound(name, inner_steps=1)
    p, batch = state["params"], batch_of(learner, state, world)
    if learner.inner.acts:
        learner.settings = MAML(learner=PROBLEMS[name][0], num_envs=K, inner_steps=0)
    _, grads = gradient(learner, p, batch)
    for weight in list(p["weights"])[:3]:
        value = p["weights"][weight]
        index, eps = (1,) + (0,) * (value.dim() - 1), 1e-6
        ends = []
        for sign in (1, -1):
            moved = value.clone()
            moved[index] += sign * eps
            ctx = StepContext(training=True, report=False)
            ends.append(learner.losses({**p, "weights": {**p["weights"], weight: moved}}, batch, ctx)["query"][1])
        assert grads[weight][index].item() == pytest.approx(
            ((ends[0] - ends[1]) / (2 * eps)).item(), rel=2e-5, abs=1e-8
        )


@pytest.mark.parametrize("name", PROBLEMS)
def test_batched_learners_and_tasks_are_loops(name):
    learner, state, world = bound(name)
    p, batch = state["params"], batch_of(learner, state, world)
    loss, together = gradient(learner, p, batch)
    for s in range(S):
        found = []
        for k in range(K):
            one = tree.map(lambda x, s=s, k=k: x[s : s + 1, k : k + 1], batch)
            found.append(gradient(learner, tree.map(lambda x, s=s: x[s : s + 1], p), one))
        torch.testing.assert_close(loss[s], torch.stack([each[0][0] for each in found]).mean())
        for weight, value in together.items():
            torch.testing.assert_close(value[s], torch.stack([each[1][weight][0] for each in found]).mean(0))


@pytest.mark.parametrize("name", ["regressor", "classifier"])
def test_without_inner_steps_it_is_joint_training_on_the_queries(name):
    learner, state, world = bound(name, inner_steps=0)
    p, batch = state["params"], batch_of(learner, state, world)
    _, found = gradient(learner, p, batch)
    leaves = {n: w.clone().requires_grad_() for n, w in p["weights"].items()}
    pooled = tree.map(lambda x: x.flatten(1, 2), batch["query"])
    plain = learner.inner.losses({**p, "weights": leaves}, pooled, StepContext(training=True, report=False))["net"]
    for weight, g in zip(leaves, torch.autograd.grad(plain.sum(), list(leaves.values()))):
        torch.testing.assert_close(found[weight], g)
    rate_0, *_ = bound(name)
    zero = {**p, "hyper": {**p["hyper"], "inner_rate": torch.zeros(S, dtype=torch.float64)}}
    for order in (False, True):
        rate_0.settings = MAML(learner=PROBLEMS[name][0], num_envs=K, inner_steps=3, first_order=order)
        for weight, g in gradient(rate_0, zero, batch)[1].items():
            torch.testing.assert_close(g, found[weight])


@pytest.mark.parametrize("name", PROBLEMS)
def test_first_order_differs_and_is_the_gradient_at_the_end(name):
    learner, state, world = bound(name, first_order=True)
    p, batch = state["params"], batch_of(learner, state, world)
    _, first = gradient(learner, p, batch)
    end = learner.adapted(learner.start(p, K), batch["support"], 2, "none")
    leaves = {n: w.clone().requires_grad_() for n, w in end["weights"].items()}
    loss = learner.loss({**end, "weights": leaves}, batch["query"]).sum()
    at_end = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    for weight, g in zip(leaves, at_end):
        torch.testing.assert_close(first[weight], g.mean(1))
    learner.settings = MAML(learner=PROBLEMS[name][0], num_envs=K, inner_steps=2)
    _, second = gradient(learner, p, batch)
    apart = [(first[w] - second[w]).norm() / second[w].norm() for w in first if second[w].any()]
    assert max(apart) > 1e-2


class Tied(torch.nn.Module):
    """One layer, used twice."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(1, 1)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(1, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(x.unsqueeze(1).expand(-1, 2, -1))[0][:, 1]


NETWORKS = {
    "tied": (lambda space: Tied(), 2),
    "recurrent": (lambda space: Recurrent(), 4),
    "batch norm": (
        lambda space: torch.nn.Sequential(
            torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3, track_running_stats=False), torch.nn.Tanh()
        ),
        4,
    ),
}
"""Networks of one's own, and how many tensors they have."""


@pytest.mark.parametrize("kind", NETWORKS)
def test_no_task_changes_another_in_a_network_of_ones_own(kind):
    """Statistics of a batch are those of one task; tied weights are one weight; recurrent ones are used."""
    network, tensors = NETWORKS[kind]
    with mock.patch.dict(PROBLEMS, own=(Regressor(network=network), PROBLEMS["regressor"][1])):
        learner, state, world = bound("own")
    p, batch = state["params"], batch_of(learner, state, world)
    own = [name for name in p["weights"] if not name.startswith("net.1.")]  # without the last layer
    assert len(own) == tensors
    loss, together = gradient(learner, p, batch)
    apart = []
    for s in range(S):
        for k in range(K):
            one = tree.map(lambda x, s=s, k=k: x[s : s + 1, k : k + 1], batch)
            apart.append(gradient(learner, tree.map(lambda x, s=s: x[s : s + 1], p), one))
    torch.testing.assert_close(loss, torch.stack([each[0] for each in apart]).reshape(S, K).mean(1))
    for weight, value in together.items():
        torch.testing.assert_close(value, torch.stack([g[weight][0] for _, g in apart]).unflatten(0, (S, K)).mean(1))
        assert value.abs().max() > 0 or (kind == "batch norm" and weight.endswith("0.bias"))


# ---------------------------------------------------------------------- reinforcement learning


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", ["reinforce", "ppo"])
def test_on_a_bandit_the_meta_gradient_is_exact(steps, kind):
    """All arms enumerated with their probabilities as weights: what is left is the estimator itself."""
    reward = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    inner = (
        REINFORCE(baseline="none", normalise_return=False, hidden_sizes=())
        if kind == "reinforce"
        else PPO(
            num_envs=1, num_steps=3, batch_size=3, normalise_advantage=False, hidden_sizes=(), value_coefficient=0.0
        )
    )
    env = Bandit(mean=(0.1, 0.2, 0.3))
    maml = MAML(learner=inner, num_envs=1, inner_steps=steps, inner_rate=0.75)
    with mock.patch.object(Encoder.__init__, "__defaults__", (torch.float64,)):
        learner = maml.bind(env.observation_space, env.action_space)
    family = NamedFamily("bandit", TaskFamily("bandit", Task("bandit", env), {}))
    state = learner.init(random.make_keys([0]), hyper_tensors([maml], 1), family.world((1,), 1))
    p = doubled(state["params"])
    name = "policy.head.linear.bias"
    p["weights"] = {
        n: w + 0.3 * torch.arange(w.numel()).reshape(w.shape) if n == name else w for n, w in p["weights"].items()
    }

    def log_prob(p):  # [1, 1, 3]
        batch = {"observation": torch.zeros(1, 1, 3, dtype=torch.int64), "action": torch.arange(3).expand(1, 1, 3)}
        return learner.inner.log_prob(p, batch)

    def enumerated(p):
        value = log_prob(p).detach()
        rows = {"credit": reward, "return": reward, "advantage": reward, "old_value": reward}
        return {
            "observation": torch.zeros(1, 1, 3, dtype=torch.int64),
            "action": torch.arange(3).expand(1, 1, 3),
            "valid": value.exp(),
            "old_log_prob": value,
            "clip_range": torch.full((1, 1), 0.2, dtype=torch.float64),
            **{n: r.expand(1, 1, 3) for n, r in rows.items()},
        }

    support, at = {}, learner.start(p, 1)
    for i in range(steps):
        support[str(i)] = enumerated(at)
        at = learner.adapted(at, support[str(i)], 1, "none")
    _, found = gradient(learner, p, {"support": support, "query": enumerated(at)})

    leaves = {n: w.clone().requires_grad_() for n, w in p["weights"].items()}
    now = learner.start({**p, "weights": leaves}, 1)
    for _ in range(steps):
        expected = (log_prob(now).exp() * reward).sum()
        moves = torch.autograd.grad(expected, list(now["weights"].values()), create_graph=True, allow_unused=True)
        moved = {n: w if g is None else w + 0.75 * g for (n, w), g in zip(now["weights"].items(), moves)}
        now = {**now, "weights": moved}
    loss = -(log_prob(now).exp() * reward).sum()
    exact = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    for weight, g in zip(leaves, exact):
        if weight.startswith("policy"):
            torch.testing.assert_close(found[weight], g, rtol=1e-9, atol=1e-12)
    assert found[name].abs().max() > 1e-2


def test_the_surrogates_ratio_is_1_at_the_adapted_policy():
    """`losses` repeats the adaptation that the rollouts were made by."""
    learner, state, world = bound("ppo", double=False)
    batch, metrics = learner.experience(state, world, world.tasks(state["key"], 0, K, "train"))
    ctx = StepContext(training=True)
    learner.losses(state["params"], batch, ctx)
    assert ctx.info["losses/approx_kl"].abs().max() < 1e-6
    assert batch["query"]["action"].shape == (S, K, 80, 2) and set(batch["support"]) == {"0", "1"}
    assert metrics["charts/return_after"].shape == (S,)


def test_a_tasks_constants_stay_and_its_rollouts_are_fresh():
    learner, state, world = bound("reinforce", double=False)
    tasks = world.tasks(state["key"], 0, K, "train")
    batch, _ = learner.experience(state, world, tasks)
    again, _ = learner.experience(state, world, tasks)
    assert torch.equal(batch["query"]["action"], again["query"]["action"])
    assert not torch.equal(batch["support"]["0"]["action"], batch["query"]["action"])
    distinct = tasks["goal_x"].flatten()
    assert len(distinct.unique()) == S * K and distinct.abs().max() < 0.5
    held_out = world.tasks(state["key"], 0, K, "test")["goal_x"].flatten()
    assert not set(distinct.tolist()) & set(held_out.tolist())


def test_the_return_of_episodes_that_do_not_end_is_each_rows():
    """CartPoles that stand for all of 5 steps have 5 each, not the 20 of the four together."""
    inner = REINFORCE(num_envs=4, num_steps=5, baseline="batch", hidden_sizes=(4,))
    family = NamedFamily("cartpole-physics", rl.family("cartpole-physics"))
    with mock.patch.dict(PROBLEMS, carts=(inner, family)):
        learner, state, world = bound("carts", double=False)
    _, metrics = learner.experience(state, world, world.tasks(state["key"], 0, K, "train"))
    assert metrics["charts/return_before"].tolist() == [5.0] * S


def test_settings_that_a_single_task_cannot_have_are_refused():
    for settings in (PPO(normalise_observation=True), PPO(normalise_reward=True), PPO(penalty="kl")):
        with pytest.raises(SettingError, match="MAML"):
            MAML(learner=settings).bind(NAVIGATION.source.observation_space, NAVIGATION.source.action_space)


# ---------------------------------------------------------------------- as every learner


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_learners_numbers_are_its_own(name):
    learner, state, world = bound(name, double=False)
    alone, single, one = bound(name, seeds=[1], double=False)
    for _ in range(3):
        state, _ = learner.iterate(state, world)
        single, metrics = alone.iterate(single, one)
    for weight, value in single["params"]["weights"].items():
        torch.testing.assert_close(state["params"]["weights"][weight][1:2], value, rtol=2e-4, atol=1e-5)
    assert all(torch.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize("name", PROBLEMS)
def test_evaluation_changes_nothing_and_keeps_no_graph(name):
    learner, state, world = bound(name, double=False)
    before, drawn = tree.map(torch.clone, state["params"]), torch.get_rng_state()
    curve = learner.adaptation(state["params"], world, state["key"], 53, 2)
    assert curve.shape == (S, 53, 3) and curve.dtype == torch.float64 and not curve.requires_grad
    result = learner.evaluate(state["params"], world, state["key"], 53)
    assert torch.equal(result.returns, curve[..., 2])
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(state["params"])))
    assert torch.equal(drawn, torch.get_rng_state())


def test_it_learns_to_learn():
    run = rl.train(rl.MAML(inner_rate=0.02, meta_rate=5e-3), rl.family("sinusoid"), steps=7_500, seeds=2)
    curve = run.agent.adaptation(run.agent.effective_params(run.state), run.world, run.state["key"], 100, 1).mean(
        (0, 1)
    )
    assert curve[1] < 1.6 < 2.5 < curve[0]


@pytest.mark.parametrize("name", ["regressor", "reinforce"])
def test_the_task_that_loses_its_numbers_is_named(name):
    inner, problem = PROBLEMS[name]
    settings = rl.MAML(inner, num_envs=K, inner_steps=3, inner_rate=[0.01, 1e38])
    with pytest.warns(
        RuntimeWarning, match=r"inner_rate=1e\+38\) is no longer finite \(task 0 of .* 0 has loss"
    ) as said:
        run = rl.train(settings, problem, steps=960, seeds=1)
    assert any("after 1 of 3 inner steps" in str(one.message) for one in said)
    assert run.scores.isfinite().tolist() == [True, False]
    assert run.agent.broken_task(run.state, run.world, 0) == ""


def test_a_broken_task_is_found_in_a_later_meta_batch():
    """The learner and its counters stay as they were then."""

    class Late(Sinusoid):
        def tasks(self, key, counter, count, split):
            drawn = super().tasks(key, counter, count, split)
            late = torch.as_tensor(counter).expand(key.shape) == 7
            spoilt = late.unsqueeze(-1) & (torch.arange(count) == 2) & (split == "train")
            target = drawn["query"]["target"].masked_fill(spoilt[..., None, None], torch.inf)
            return {**drawn, "query": {**drawn["query"], "target": target}}

    with pytest.warns(RuntimeWarning, match=r"task 2 of meta-batch 7 has loss inf after 1 of 1 inner steps"):
        rl.train(rl.MAML(SMALL, num_envs=4), Late(), steps=4_000)


def test_permuted_labels_leave_chance():
    """What the support says is used: with its labels shuffled, accuracy is 1 / N."""
    learner, state, world = bound("classifier", double=False, inner_steps=5, inner_rate=1.0)
    tasks = world.tasks(state["key"], 0, 400, "test")
    keys = random.fold(state["key"].unsqueeze(-1), torch.arange(400))
    order = random.permutation(keys, "shuffle", 0, 2)
    tasks["query"]["target"] = order.gather(-1, tasks["query"]["target"])
    p = learner.adapted(learner.start(state["params"], 400), tasks["support"], 5, "none")
    assert float(learner._score(p, tasks["query"]).mean()) == pytest.approx(0.5, abs=0.04)


def test_a_run_that_was_stopped_and_resumed_is_the_one_that_was_not(tmp_path):
    settings, family = rl.MAML(SMALL, num_envs=5, meta_rate_schedule="linear"), "sinusoid"
    whole = rl.train(settings, family, steps=300, seeds=2, threads=1)

    def stop(run, line):
        return line["iteration"] >= 23

    rl.train(settings, family, steps=300, seeds=2, threads=1, out=tmp_path / "run", callbacks=[stop])
    again = rl.resume(tmp_path / "run")
    assert again.experiment.variants == (settings,)
    for name, value in tree.flatten(whole.state).items():
        assert torch.equal(value, tree.flatten(again.state)[name]), name
    assert torch.equal(whole.scores, again.scores)


def test_running_statistics_are_refused():
    def network(space):
        return torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3))

    with pytest.raises(SettingError, match="running_mean would be statistics of no task: use LayerNorm"):
        rl.train(rl.MAML(Regressor(network=network), num_envs=2), "sinusoid", steps=4)


class Attention(torch.nn.Module):
    def __init__(self, space):
        super().__init__()
        self.first = torch.nn.Linear(1, 4)
        self.layer = torch.nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(self.first(x).unsqueeze(1)).squeeze(1)


def test_attention_can_be_differentiated_twice():
    """Torch's fused attention has no second derivative."""
    after = []
    for first_order in (False, True):
        maml = rl.MAML(Regressor(network=Attention), num_envs=2, inner_rate=0.1, first_order=first_order)
        after.append(rl.train(maml, "sinusoid", steps=8).state["params"]["weights"])
    assert any(not torch.equal(value, after[1][name]) for name, value in after[0].items())


def test_dropout_is_refused_by_name():
    def network(space):
        return torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Dropout(0.5))

    with pytest.raises(SettingError, match="no key: leave dropout and noise out"):
        rl.train(rl.MAML(Regressor(network=network), num_envs=2), "sinusoid", steps=4)


def test_problems_of_another_kind_are_refused():
    with pytest.raises(SettingError, match="MAML learns from a family of tasks, 'CartPole-v1' is none"):
        rl.train(rl.MAML(), rl.task("CartPole-v1"))
    with pytest.raises(SettingError, match="'sinusoid' is a family of tasks for meta-learners, Regressor learns one"):
        rl.train(Regressor(), "sinusoid")
    with pytest.raises(SettingError, match="LearnedOptimizer minimises functions, Sinusoid is a family of other tasks"):
        rl.train(rl.LearnedOptimizer(), "sinusoid")
    with pytest.raises(SettingError, match="inner_steps is -1"):
        rl.MAML(inner_steps=-1)
    with pytest.raises(SettingError, match=r"inner_steps is 1\.5, expected a whole number"):
        rl.MAML(inner_steps=1.5)
    for strange in (rl.Regressor, "regressor", torch.nn.Linear(1, 1)):
        with pytest.raises(SettingError, match=r"MAML: learner is .*, expected the settings of one, such as Regressor"):
            rl.MAML(strange)
    for learner, name, message in (
        (None, "quadratics", "Quadratics is a family of functions to minimise: use LearnedOptimizer"),
        (rl.PPO(), "sinusoid", "PPO can't learn a family of samples: give MAML a Regressor"),
        (Regressor(), "navigation", "Regressor can't learn a family to act in: give MAML REINFORCE or PPO"),
        (rl.MAML(), "sinusoid", "MAML can't adapt MAML"),
        (rl.DQN(), "cartpole-physics", "MAML can't adapt DQN"),
        (Regressor(learning_rate=[0.1, 0.2]), "sinusoid", "MAML's Regressor compares values"),
        (rl.PPO(rewards=(rl.EpisodicCounts(),)), "navigation", "PPO learns from the tasks' own rewards"),
    ):
        with pytest.raises(SettingError, match=message):
            rl.train(rl.MAML(learner), name)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("none", None),
        ("regressor hidden_sizes=40x40", Regressor(hidden_sizes=(40, 40))),
        ("reinforce num_steps=20 baseline=batch", REINFORCE(num_steps=20, baseline="batch")),
    ],
)
def test_a_learner_is_a_setting_in_text(text, settings):
    from rlmeta.runs import grammar

    assert grammar.learner(text) == settings
    assert grammar.learner(grammar.text_of(settings)) == settings
    for wrong, message in (("regressor hidden", "SETTING=VALUE"), ("regressor lr=1", "lr"), ("regressr", "regressor")):
        with pytest.raises((SettingError, LookupError), match=message):
            grammar.learner(wrong)


# ---------------------------------------------------------------------- one meta-update, by its parts


@pytest.mark.parametrize(("schedule", "left"), [("constant", [1.0, 1.0, 1.0]), ("linear", [1.0, 0.5, 0.0])])
def test_the_meta_rate_follows_its_schedule(schedule, left):
    """Adam's first move is its rate in every weight: of equal learners at 0, half and all of their budget."""
    settings = {"meta_rate_schedule": schedule, "meta_rate": 0.01}
    learner, state, world = bound("regressor", seeds=[4, 4, 4], double=False, **settings)
    state["progress"] = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    before = {n: w.clone() for n, w in state["params"]["weights"].items()}
    state, _ = learner.iterate(state, world)
    for name, w in state["params"]["weights"].items():
        moved = (w - before[name]).flatten(1)
        expected = 0.01 * torch.tensor(left).unsqueeze(-1) * moved[0].sign()
        torch.testing.assert_close(moved, expected.expand_as(moved), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("steps", "expected"), [(6, 3.0), (7, 7 / 3), (8, 8 / 3), (3, 3.0), (2, 2.0)])
def test_the_return_of_episodes_that_end_is_each_episodes(steps, expected):
    """Poles that are cut after 3 steps, which none falls in: what is left at the end of a rollout counts as one."""
    inner = REINFORCE(num_envs=4, num_steps=steps, baseline="batch", hidden_sizes=(4,))
    cut = TaskFamily("cut", rl.task("CartPole-v1", settings={"max_episode_steps": 3}), {"length": (0.4, 0.6)})
    with mock.patch.dict(PROBLEMS, cut=(inner, NamedFamily("cut", cut))):
        learner, state, world = bound("cut", double=False)
    _, metrics = learner.experience(state, world, world.tasks(state["key"], 0, K, "train"))
    for name in ("charts/return_before", "charts/return_after"):
        torch.testing.assert_close(metrics[name], torch.full((S,), expected, dtype=torch.float64))


def test_rollouts_are_fresh_before_and_after_and_in_every_iteration():
    learner, state, world = bound("reinforce", double=False, inner_rate=0.0)
    tasks = world.tasks(state["key"], 0, K, "train")
    _, metrics = learner.experience(state, world, tasks)
    assert not torch.equal(metrics["charts/return_before"], metrics["charts/return_after"])
    later = {**state, "count": {**state["count"], "iterations": state["count"]["iterations"] + 1}}
    _, other = learner.experience(later, world, tasks)
    assert not torch.equal(metrics["charts/return_before"], other["charts/return_before"])


@pytest.mark.parametrize("name", ["regressor", "reinforce"])
def test_what_an_iteration_counts(name):
    learner, state, world = bound(name, double=False, meta_epochs=2)
    for _ in range(2):
        state, _ = learner.iterate(state, world)
    each = 4 * 20 * 3 if learner.inner.acts else 1  # environments, steps, and rollouts of two inner steps
    assert learner.steps_per_iteration == each
    counted = {n: c.tolist() for n, c in state["count"].items()}
    assert counted["iterations"] == [2] * S and counted["gradient_steps"] == [4] * S
    assert counted["vector_steps"] == counted["task_steps"] == [2 * each] * S
    assert counted["env_steps"] == [2 * each * K] * S


def test_the_meta_gradient_is_clipped_by_its_norm():
    learner, state, world = bound("regressor", double=False, max_grad_norm=1e-12)
    before = {n: w.clone() for n, w in state["params"]["weights"].items()}
    state, metrics = learner.iterate(state, world)
    moved = max(float((w - before[n]).abs().max()) for n, w in state["params"]["weights"].items())
    assert moved < 1e-4 and (metrics["losses/grad_norm"] > 1e-3).all()  # below Adam's epsilon


def test_every_iteration_has_tasks_of_its_own_and_draws_leave_no_trace():
    learner, state, world = bound("regressor", double=False)
    seen = []
    tasks = world.tasks
    world.tasks = lambda key, counter, count, split: (
        seen.append((counter.tolist(), count, split)) or tasks(key, counter, count, split)
    )
    for _ in range(2):
        state, _ = learner.iterate(state, world)
    assert seen == [([0] * S, K, "train"), ([1] * S, K, "train")]
    world.tasks = tasks
    before = tree.map(torch.clone, {n: v for n, v in state.items() if n != "methods"})
    drawn = learner.draw(state, world, 5)
    assert drawn["query"]["target"].shape[:2] == (S, 5)
    now = world.tasks(state["key"], state["count"]["iterations"], 5, "train")
    assert not torch.equal(drawn["query"]["target"], now["query"]["target"])
    for a, b in zip(tree.leaves(before), tree.leaves({n: v for n, v in state.items() if n != "methods"})):
        assert torch.equal(a, b)


def test_an_evaluation_of_many_tasks_asks_about_each_once():
    """In parts of 50, each with tasks of its own, of the split that is asked for."""
    learner, state, world = bound("regressor", double=False)
    curve = learner.adaptation(state["params"], world, state["key"], 120, 1)
    assert len(curve[0, :, 0].unique()) == 120
    other = learner.adaptation(state["params"], world, state["key"], 120, 1, split="validation")
    assert not torch.isin(other, curve).any()
    torch.testing.assert_close(learner.adaptation(state["params"], world, state["key"], 120, 0)[..., 0], curve[..., 0])
    found = learner.evaluate(state["params"], world, state["key"], 3)
    assert found.lengths.tolist() == [[2, 2, 2]] * S


def test_an_agent_is_measured_by_its_mode_or_by_samples():
    learner, state, world = bound("reinforce", double=False)
    given = (state["params"], world, state["key"], 2, 1)
    modes = [learner.adaptation(*given, deterministic=True) for _ in range(2)]
    assert torch.equal(*modes) and not torch.equal(modes[0], learner.adaptation(*given, deterministic=False))

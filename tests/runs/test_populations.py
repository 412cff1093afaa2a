"""Populations: who is replaced by whom, what a copy takes over and what stays its own, records, resume."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.functional import random, tree
from rlmeta.learning import populations
from rlmeta.learning.settings import values_of, variants
from rlmeta.runs.experiment import Experiment
from rlmeta.runs.run import Run
from tests.runs.killer import Killer
from tests.runs.test_resume import assert_same_run

SMALL = {"num_envs": 2, "num_steps": 8, "hidden_sizes": (8,)}
RATES = [1e-4, 1e-3, 1e-2, 1e-1]
BUDGET = {"steps": 320, "eval_episodes": 2, "final_episodes": 2, "checkpoint_seconds": 0.0, "log_points": 10}
POPULATION = rl.PBT(every=64, fraction=0.5)


def train(settings: object = None, population: object = POPULATION, **others: object) -> rl.Run:
    settings = settings or rl.A2C(learning_rate=RATES, **SMALL)
    return rl.train(
        settings,
        rl.task("CartPole-v1", max_episode_steps=40),
        **{"seeds": 2, "population": population, "threads": 1, **BUDGET, **others},
    )


def train_until(folder: str, at: int) -> None:
    """It is killed at that iteration."""

    def kill(run: rl.Run, line: dict[str, object]) -> None:
        if line["iteration"] >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    train(out=folder, callbacks=[kill])


def lines_of(folder: Path) -> list[dict[str, list[float]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "population/parent" in line]


# ------------------------------------------------------------------------------------------------- who becomes whom


def keys(members: int, populations_: int) -> torch.Tensor:
    return random.make_keys(range(members * populations_)).reshape(members, populations_)


def test_the_worst_become_copies_of_the_best_that_are_better() -> None:
    score = torch.tensor(
        [[5.0, 0.0], [1.0, 7.0], [9.0, 7.0], [3.0, 7.0], [8.0, 7.0], [2.0, 7.0], [4.0, 7.0], [6.0, 7.0]]
    )
    seen = set()
    for seed in range(20):
        parents = rl.PBT(fraction=0.25).parents(score, torch.ones_like(score).bool(), keys(8, 2) + seed)
        assert parents[[0, 2, 3, 4, 6, 7], 0].tolist() == [0, 2, 3, 4, 6, 7], "those between stay"
        assert {parents[1, 0].item(), parents[5, 0].item()} <= {2, 4}
        seen |= {(parents[1, 0].item(), parents[5, 0].item())}
        assert parents[0, 1] in (1, 2) and parents[1:, 1].tolist() == list(range(1, 8)), "equal scores replace nobody"
    assert len(seen) == 4, "each of the best may be copied, by each of the worst"


def test_who_stopped_is_always_replaced_and_never_copied() -> None:
    score = torch.tensor([[math.nan], [9.0], [3.0], [8.0], [1.0], [2.0], [5.0], [4.0]])
    active = torch.tensor([1, 0, 1, 0, 1, 1, 1, 1]).bool().unsqueeze(1)
    parents = rl.PBT(fraction=0.25).parents(score, active, keys(8, 1)).flatten()
    assert {parents[0].item(), parents[1].item(), parents[3].item()} <= {6, 7}
    assert parents[[2, 5, 6, 7]].tolist() == [2, 5, 6, 7]
    assert rl.PBT().parents(score, torch.zeros_like(active), keys(8, 1)).flatten().tolist() == list(range(8))
    half = rl.PBT(fraction=0.5).parents(score[:2], active[:2], keys(2, 1))
    assert half.flatten().tolist() == [0, 1], "nobody has anything to give"


def test_populations_at_once_are_those_of_a_loop() -> None:
    score = random.uniform(keys(4, 4), "score", 0, ())
    active = random.uniform(keys(4, 4), "active", 0, ()) < 0.8
    together = POPULATION.parents(score, active, keys(4, 4))
    for i in range(4):
        one = POPULATION.parents(score[:, i : i + 1], active[:, i : i + 1], keys(4, 4)[:, i : i + 1])
        assert torch.equal(together[:, i : i + 1], one)


def test_a_setting_is_multiplied_by_one_of_the_factors() -> None:
    value = torch.full((1000,), 2.0)
    new = rl.PBT(shrink=0.5, grow=3.0).explore(value, random.make_keys(range(1000)))
    assert set(new.tolist()) == {1.0, 6.0} and 400 < (new == 1.0).sum() < 600


# ------------------------------------------------------------------------------------------------- what is copied

AGENTS = {
    "ppo": rl.PPO(
        learning_rate=RATES,
        num_epochs=1,
        batch_size=16,
        normalise_reward=True,
        rewards=(rl.RND(batch_size=16, hidden_sizes=(8,), outputs=4), rl.EpisodicCounts()),
        **SMALL,
    ),
    "dqn": rl.DQN(learning_rate=RATES, learning_starts=16, capacity=200, batch_size=8, average_rate=0.5, **SMALL),
}
OWN = ("key", "count", "world", "memory", "episode", "replay", "best", "metrics", "progress", "task")
LEARNED = ("params", "optimizer", "values", "kl_coefficient")


@pytest.mark.parametrize("name", AGENTS)
def test_a_copy_takes_what_was_learned_and_nothing_that_is_a_learners_own(name: str) -> None:
    run = train(AGENTS[name], None, seeds=1, steps=128, eval_every=64)
    state = populations.begin(run.state)
    state["active"] = torch.tensor([False, True, False, True])
    before = {leaf: value.clone() for leaf, value in tree.flatten(state).items()}
    parent = torch.tensor([1, 1, 2, 1])
    after = tree.flatten(populations.copied(state, parent, parent != torch.arange(4)))
    assert all(torch.equal(value, tree.flatten(state)[leaf]) for leaf, value in before.items()), "written in place"
    counted = {"copied": 0, "own": 0}
    for leaf, value in before.items():
        parts = leaf.split("/")
        if parts[-1] == "active" or parts[0] == "population":
            continue
        if parts[0] in OWN or {"accumulator", "key", "gradient_steps"} & set(parts) or "rewards/counts" in leaf:
            counted["own"] += 1
            assert torch.equal(torch.nan_to_num(after[leaf]), torch.nan_to_num(value)), leaf
        else:
            counted["copied"] += 1
            assert parts[0] in LEARNED or "rewards/rnd" in leaf, leaf
            assert torch.equal(after[leaf], value[parent]), leaf
    assert after["active"].tolist() == [True, True, False, True], "a copy goes on, whatever had stopped it"
    assert after["population/origin"].tolist() == [1, 1, 2, 1]
    assert after["population/copies"].tolist() == [1, 0, 0, 1]
    assert min(counted.values()) > 10


@pytest.mark.parametrize("name", AGENTS)
def test_clones_do_not_act_alike(name: str) -> None:
    """Even from the same state of the same world: their keys differ, though their seed is one."""
    settings = AGENTS[name]
    experiment = Experiment(tuple(variants(settings)), (0,), rl.task("CartPole-v1"),
                            population=POPULATION)  # fmt: skip
    run = Run(experiment, None)
    run.start()
    assert len(set(run.state["key"].tolist())) == 4
    run.state["world"] = tree.map(lambda leaf: leaf[:1].expand_as(leaf).clone(), run.state["world"])
    parent = torch.tensor([0, 0, 0, 0])
    run.state = populations.copied(run.state, parent, parent != torch.arange(4))
    for _ in range(4):
        run.state, _ = run.agent.iterate(run.state, run.world)
    seen = run.world.observation(run.state["world"])
    assert not any(torch.equal(seen[i], seen[j]) for i in range(4) for j in range(i))
    run.close()


@pytest.mark.filterwarnings("ignore:.*no longer finite")
def test_a_learner_that_stopped_goes_on_from_a_donor() -> None:
    settings = rl.A2C(learning_rate=[1e-3, 2e-3, 1e38, 4e-3], **SMALL)
    alone = train(settings, None, seeds=1)
    assert alone.state["active"].tolist() == [True, True, False, True]
    run = train(settings, rl.PBT(every=64), seeds=1)
    assert run.state["active"].all() and run.scores.isfinite().all()
    row = run.summary()[2]
    assert row["origin"] != [2] and row["copies"][0] >= 1 and row["settings"]["learning_rate"][0] < 1.0
    steps = run.state["count"]["gradient_steps"]
    assert 0 < steps[2] < steps[0] and (steps[[0, 1, 3]] == steps[0]).all()


def test_values_that_the_settings_refuse_are_left_as_the_donors() -> None:
    run = train(rl.A2C(gamma=[0.9, 0.95, 0.99, 1.0], **SMALL), rl.PBT(every=32, fraction=0.5, shrink=1.0, grow=1.2))
    begun = torch.tensor([0.9, 0.95, 0.99, 1.0])
    assert torch.isin(run.state["params"]["hyper"]["gamma"], begun).all()
    assert sum(sum(row["copies"]) for row in run.summary()) > 0


def test_a_loss_is_better_where_it_is_lower() -> None:
    run = rl.train(rl.MAML(inner_rate=[1e-3, 1e-2, 0.1, 50.0], num_envs=4), "sinusoid", steps=64, seeds=2,
                   population=rl.PBT(every=32), eval_episodes=4, final_episodes=4, threads=1)  # fmt: skip
    assert not run.agent.score.maximise
    rates = run.state["params"]["hyper"]["inner_rate"].reshape(4, 2)
    assert (rates[3] < 1.0).all(), "the one that diverges is replaced"


# ------------------------------------------------------------------------------------------------- records and resume


@pytest.mark.parametrize("at", [4, 7])
def test_killed_and_resumed_across_an_exchange_equals_never_stopped(at: int, tmp_path: Path, killer: Killer) -> None:
    whole = train(out=tmp_path / "whole")
    killer.kill("tests.runs.test_populations:train_until", str(tmp_path / "killed"), at)
    assert [line["iteration"] for line in lines_of(tmp_path / "whole")] == [4, 8, 12, 16]
    assert_same_run(whole, rl.resume(tmp_path / "killed"))


def test_more_steps_exchange_where_a_longer_run_would_have(tmp_path: Path) -> None:
    longer = train(out=tmp_path / "longer", steps=320)
    train(out=tmp_path / "run", steps=128, eval_every=32, log_points=4)
    resumed = rl.resume(tmp_path / "run", steps=320)
    exchanges = [[line["population/parent"] for line in lines_of(tmp_path / name)] for name in ("longer", "run")]
    assert exchanges[0] == exchanges[1] and len(exchanges[0]) == 4
    for name, value in tree.flatten(longer.state["params"]).items():
        assert torch.equal(value, tree.flatten(resumed.state["params"])[name]), name


def extend_until_opened(folder: str) -> None:
    """It is killed between the checkpoint with the longer budget and the evaluation at the old end."""
    rl.resume(folder, steps=320, trackers=[lambda run: os.kill(os.getpid(), signal.SIGKILL)])


def test_killed_before_the_evaluation_at_the_old_end_it_is_made_and_exchanged_later(
    tmp_path: Path, killer: Killer
) -> None:
    whole, rhythm = train(out=tmp_path / "whole"), {"steps": 128, "eval_every": 32}
    train(out=tmp_path / "run", **rhythm)
    for _ in range(2):
        killer.kill("tests.runs.test_populations:extend_until_opened", str(tmp_path / "run"))
    longer = rl.resume(tmp_path / "run")
    assert [line["iteration"] for line in lines_of(tmp_path / "run")] == [4, 8, 12, 16]
    ours, theirs = (
        {k: v for k, v in tree.flatten(run.state).items() if not k.startswith("metrics")} for run in (longer, whole)
    )
    assert all(torch.equal(value.nan_to_num(), theirs[name].nan_to_num()) for name, value in ours.items())


def test_lineage_and_settings_are_in_the_records_and_the_summary(tmp_path: Path) -> None:
    run = train(out=tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    origin, copies, rates = list(range(8)), [0] * 8, values_of([rate for rate in RATES for _ in range(2)])
    for line in lines:
        parents = [int(parent) for parent in line["population/parent"]]
        assert all(parent % 2 == i % 2 for i, parent in enumerate(parents)), "every seed is a population of its own"
        origin = [origin[parent] for parent in parents]
        copies = [count + (parent != i) for i, (count, parent) in enumerate(zip(copies, parents))]
        for i, (parent, rate) in enumerate(zip(parents, line["population/learning_rate"])):
            factors = (1.0,) if parent == i else (0.8, 1.2)
            assert any(math.isclose(rate, rates[parent] * factor, rel_tol=1e-5) for factor in factors)
        rates = line["population/learning_rate"]
    assert sum(copies) > 4
    rows = rl.load(tmp_path / "run").summary()
    assert rows == json.loads((tmp_path / "run" / "summary.json").read_text())["summary"]
    assert [place for row in rows for place in row["origin"]] == [place // 2 for place in origin]
    assert [count for row in rows for count in row["copies"]] == copies
    assert [rate for row in rows for rate in row["settings"]["learning_rate"]] == pytest.approx(rates, rel=1e-6)
    assert [row["setting"] for row in rows] == [f"from learning_rate={rate}" for rate in RATES]
    assert "origin" not in train(population=None, steps=32).summary()[0]
    assert run.experiment.population == rl.load(tmp_path / "run").experiment.population == POPULATION


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "population", "others", "message"),
    [
        (rl.A2C(), POPULATION, {}, "members are the settings that A2C compares, and here they are all alike"),
        (None, rl.PBT(every=320), {}, "every is 320 steps, the budget is 320: no learner would ever be"),
        (None, POPULATION, {"target": 100.0}, "target is 100, but learners of a population don't stop one by one"),
    ],
)
def test_what_can_exchange_nothing_is_refused(
    settings: object, population: object, others: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        train(settings, population, out=tmp_path / "run", **others)
    assert not (tmp_path / "run").exists()


HOOKS = [
    ("parents", lambda score: score.argmax(0), "parents returned int64 of shape (2,), expected int64 of shape (4, 2)"),
    ("parents", lambda score: torch.zeros_like(score), "parents returned float32 of shape (4, 2), expected int64"),
    ("parents", lambda score: torch.full_like(score, 7).long(), "parents returned the index 7, expected int64"),
    ("parents", lambda score: torch.full_like(score, -1).long(), "parents returned the index -1, expected int64"),
    ("parents", lambda score: None, "parents returned None, expected int64"),
    ("explore", lambda value: value[:2], "explore returned float32 of shape (2,) for learning_rate, expected float32"),
    ("explore", lambda value: 0.5, "explore returned 0.5 for learning_rate, expected float32 of shape (8,)"),
    ("explore", lambda value: None, "explore returned None for learning_rate, expected float32 of shape (8,)"),
]


def own(hook: str, answer: Callable[[torch.Tensor], Any]) -> rl.PBT:
    """A population of one's own, whose hook calls a function of its first argument."""
    members = {"name": "mine", hook: lambda self, first, *others: answer(first)}
    return type("Mine", (rl.PBT,), members)(every=64, fraction=0.5)


@pytest.mark.parametrize(("hook", "answer", "message"), HOOKS)
def test_what_a_hook_returns_is_checked_before_anything_is_trained(
    hook: str, answer: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=f"^population: Mine.{re.escape(message)}"):
        train(population=own(hook, answer), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_values_explored_in_another_dtype_are_taken_in_the_settings_own(tmp_path: Path) -> None:
    run = train(population=own("explore", lambda value: value.double() * 2), out=tmp_path / "run")
    assert run.state["params"]["hyper"]["learning_rate"].dtype == torch.float32
    assert int(run.state["population"]["copies"].max()) > 0


@pytest.mark.parametrize("population", [3, rl.PBT, object()], ids=["number", "class", "object"])
def test_what_is_no_population_is_refused(population: object) -> None:
    with pytest.raises(SettingError, match=r"^population is .*, expected the settings of one, such as PBT\(\)"):
        train(population=population)


def test_a_stream_is_refused() -> None:
    with pytest.raises(SettingError, match="'cartpole-conflicts' is a stream, along which every learner keeps"):
        rl.train(rl.A2C(learning_rate=RATES), "cartpole-conflicts", population=POPULATION)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every": "often"}, "every is 'often', expected a whole number, such as 20k"),
        ({"every": 0}, "every is 0, expected at least 1"),
        ({"fraction": 0.6}, "fraction is 0.6, expected above 0 and at most 0.5"),
        ({"shrink": 0.0}, "shrink is 0, expected above 0"),
        ({"grow": 0.9}, "grow is 0.9, expected at least 1"),
        ({"grow": math.inf}, "grow is inf, expected a number that is finite"),
    ],
)
def test_settings_have_ranges(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        rl.PBT(**values)
    assert rl.PBT(every="20k") == rl.PBT(every=20_000)


# ------------------------------------------------------------------------------------------------- one's own, by name

OWN_CODE = """
from dataclasses import dataclass
import torch
from rlmeta.learning import populations
from rlmeta.learning.settings import values_of
from my_agent import MyAgent, MyLearner
import rlmeta as rl

@dataclass(frozen=True)
class Best(rl.PBT):
    name = "best"
    def parents(self, score, active, key):
        return score.argmax(0, keepdim=True).expand_as(score)

@dataclass(frozen=True)
class Constant(MyAgent):
    def bind(self, observation_space, action_space, methods=()):
        return ConstantLearner(self, observation_space, action_space, methods)

class ConstantLearner(MyLearner):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.farthest = max(values_of(self.settings.lambda_))
"""
FLAGS = "--num-envs 2 --num-steps 8 --hidden-sizes 8 --steps 128 --max-episode-steps 40 --quiet"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with code of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_populations.py").write_text(OWN_CODE)
    yield tmp_path
    for name in ("own_populations", "my_agent"):
        sys.modules.pop(name, None)


def test_a_setting_that_is_made_a_constant_is_refused(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = f"train own_populations:Constant CartPole-v1 {FLAGS} --population pbt --pbt.every 32"
    assert main(f"{command} --lambda 0.8,0.9 --out a".split()) == 2
    said = capfd.readouterr().err
    assert "lambda_ can't change during training, as Constant computes farthest from it once and for all" in said
    assert main(f"{command} --learning-rate 1e-3,1e-2 --out b".split()) == 0


def test_the_command_line_trains_and_resumes_one(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a2c = f"train a2c CartPole-v1 {FLAGS} --learning-rate 1e-4,1e-3,1e-2"
    assert main(f"{a2c} --population pbt --pbt.every 64 --pbt.fraction 0.5 --out a".split()) == 0
    assert rl.load("a").experiment.population == rl.PBT(every=64, fraction=0.5)
    assert main(["resume", "a"]) == 0
    assert main(f"{a2c} --population pbt --pbt.every 64 --gamma 0.9,0.99 --activation tanh,relu --out g".split()) == 0
    assert main(["resume", "g"]) == 0
    assert rl.load("g/activation=relu").experiment.population == rl.PBT(every=64)
    capfd.readouterr()
    for flags, message in (
        ("--population pbr", "unknown population 'pbr': did you mean pbt?"),
        ("--pbt.every 64", "--pbt.every: add pbt to --population"),
        ("--population pbt --pbt.evry 64", "unknown setting of PBT 'evry': did you mean every?"),
        ("--population pbt --pbt.fraction 0.9", "fraction is 0.9, expected above 0 and at most 0.5"),
    ):
        assert main(f"{a2c} {flags} --out c".split()) == 2
        assert message in capfd.readouterr().err


def test_one_of_ones_own_is_named_and_told_again(project: Path) -> None:
    command = f"train a2c CartPole-v1 {FLAGS} --learning-rate 1e-4,1e-3 --population own_populations:Best"
    assert main(f"{command} --best.every 32 --out run".split()) == 0
    run = rl.load("run", code=["own_populations"])
    assert run.experiment.population.every == 32 and len({row["origin"][0] for row in run.summary()}) == 1
    for verb in (rl.load, rl.resume):
        with pytest.raises(SettingError, match=r"had a population of your own, own_populations:Best: give its module"):
            verb("run")
    assert main(["resume", "run", "--code", "own_populations"]) == 0
    with pytest.raises(UnknownNameError, match="unknown population 'pbr': did you mean pbt"):
        train(population="pbr")

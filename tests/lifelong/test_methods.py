"""What every lifelong method must do: nothing when switched off, the same after a kill, no looking at hidden ids."""

from __future__ import annotations

import dataclasses
import functools
import shutil

import pytest
import torch

import rlmeta as rl
from rlmeta.data.samples import Samples
from rlmeta.envs.streams import stream
from rlmeta.errors import SettingError
from rlmeta.functional import tree
from rlmeta.learning.method import effective_params
from rlmeta.lifelong import AGEM, DER, ERACE, EWC, GEM, HAT, L2, MAS, SI, LwF, PackNet, Replay, RWalk
from rlmeta.lifelong.recall import per_learner
from rlmeta.runs import stages
from tests.lifelong.toy import flat, learner, points, tasks, trained

OFF = [EWC(strength=0.0), L2(strength=0.0), SI(strength=0.0), MAS(strength=0.0), RWalk(strength=0.0)]
OFF += [LwF(strength=0.0), GEM(memory=0), AGEM(memory=0), Replay(size=0), Replay(strength=0.0)]
LABELLED_OFF = [DER(size=0), DER(distillation=0.0, strength=0.0), ERACE(size=0)]
ON = [
    EWC(strength=100.0),
    GEM(memory=8),
    AGEM(memory=8, batch_size=8),
    Replay(size=6),
    L2(),
    SI(),
    MAS(),
    RWalk(),
    LwF(),
]
ON += [DER(size=6), DER(size=6, strength=0.0), ERACE(size=6)]
ON += [PackNet(), HAT()]


@pytest.mark.parametrize("method", OFF + LABELLED_OFF, ids=repr)
def test_a_method_that_is_switched_off_is_fine_tuning_bit_for_bit(method):
    assert torch.equal(flat(trained(method).state), flat(trained().state))


@pytest.mark.parametrize("method", ON, ids=lambda m: m.name)
def test_a_method_that_is_switched_on_is_not(method):
    assert not torch.equal(flat(trained(method).state), flat(trained().state))


@pytest.mark.parametrize(
    "method",
    [EWC(strength=100.0), GEM(memory=8), AGEM(memory=8), L2(), SI(), MAS(), RWalk(), LwF(), PackNet(retrain=0.0)],
)
def test_the_first_task_is_as_without_the_method(method):
    run, plain = trained(method, count=1), trained(count=1)
    assert torch.equal(flat(run.state), flat(plain.state))
    assert torch.equal(run.matrix, plain.matrix)


@pytest.mark.parametrize("method", [EWC(strength=(0.0, 100.0)), Replay(size=6, strength=(0.0, 1.0))], ids=repr)
def test_every_learner_may_have_a_strength_of_its_own(method):
    both = flat(trained(method, seeds=2).state)  # two variants of two seeds
    assert torch.equal(both[:2], flat(trained(seeds=2).state))
    alone = flat(trained(dataclasses.replace(method, strength=method.strength[1]), seeds=2).state)
    torch.testing.assert_close(both[2:], alone)
    assert not torch.equal(both[2:], both[:2])


def test_strengths_that_do_not_fit_the_learners_are_refused():
    with pytest.raises(SettingError, match="2 values for 3 learners"):
        per_learner((1.0, 2.0), trained(count=1).state)


@pytest.mark.parametrize("order", ["given", "all"])
@pytest.mark.parametrize("method", ON, ids=lambda m: m.name)
def test_a_learner_is_the_same_alone_and_in_company(method, order):
    """With orders as learners, too: seed 1 in the last of two orders."""
    together = rl.train(learner(), points(2, order), steps=80, seeds=2, lifelong=[method], progress=False)
    alone = rl.train(learner(), points(2, order), steps=80, seeds=[1], lifelong=[method], progress=False)
    torch.testing.assert_close(flat(together.state)[1::2], flat(alone.state), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.matrix[1::2], alone.matrix)


@pytest.mark.parametrize("method", ON, ids=lambda m: m.name)
@pytest.mark.parametrize("stop", [6, 11])
def test_a_run_stopped_and_resumed_ends_as_the_one_that_was_not(method, stop, tmp_path):
    """Iterations of PackNet: 4 + 2 a task, so that 6 is the end of a task and 11 in the middle of retraining."""
    arguments = {"steps": 160, "seeds": 2, "lifelong": [method], "progress": False}
    whole = rl.train(learner(), points(), out=tmp_path / "whole", budget=budget(), **without_steps(arguments))

    def stopper(run, metrics):
        return metrics["iteration"] >= stop

    rl.train(
        learner(),
        points(),
        out=tmp_path / "part",
        budget=budget(),
        callbacks=[stopper],
        **without_steps(arguments),
    )
    shutil.move(tmp_path / "part", tmp_path / "moved")
    again = rl.resume(tmp_path / "moved", env=points(), progress=False)
    ours, theirs = tree.flatten(again.state), tree.flatten(whole.state)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name].nan_to_num(), value.nan_to_num()), name


def budget() -> rl.Budget:
    return rl.Budget(steps=160, log_points=1000)


def without_steps(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name != "steps"}


@pytest.mark.parametrize("method", ON[:-2], ids=lambda m: m.name)
def test_which_task_it_is_at_test_is_not_looked_at(method):
    run = trained(method)
    state = run.state
    for identity in range(3):
        task = tree.map(lambda x, i=identity: torch.full_like(x, i), state["task"])
        p = effective_params(run.agent, state, task)
        for name, value in state["params"]["weights"].items():
            assert p["weights"][name] is value
    assert "test_id" not in method.needs


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_scores_stay_where_the_task_is_said_to_be_another_at_test(scenario):
    """The samples are those of each task, only what is said of it is turned round."""
    methods = [EWC(strength=100.0), GEM(memory=8), AGEM(memory=8, batch_size=8), Replay(size=20)]
    run = rl.train(
        rl.Classifier(hidden_sizes=(16,)),
        rl.stream("split-digits", scenario=scenario),
        steps=320,
        seeds=2,
        lifelong=methods,
        progress=False,
    )
    orders, key, world = run.experiment.orders, run.state["key"], run.evaluation_world(1)
    honest = stages.evaluate_tasks(run.agent, run.state, world, run.stream, orders, key, 1)
    for position in range(5):
        task = stages.tested_task(run.state, world, run.stream, orders, position)
        assert (task["index"] == -1).all() and (task["identity"] == -1).all()
        turned = torch.full_like(task["index"], 4 - position)
        said = {"progress": task["progress"], "index": turned, "identity": turned}
        found = run.agent.evaluate(effective_params(run.agent, run.state, said), world, key, 1)
        assert torch.equal(found.returns, honest[position].returns)


def test_a_target_on_a_stream_is_refused():
    with pytest.raises(SettingError, match=r"target is 0\.9, but every task of the stream 'points' is trained on"):
        rl.train(learner(), points(), budget=rl.Budget(steps=8, target=0.9), progress=False)


def test_a_method_that_needs_what_the_stream_hides_is_refused_before_training():
    hidden = stream(tasks(), "points", scenario="domain")
    with pytest.raises(SettingError, match="packnet needs to know which task it is tested on"):
        rl.train(learner(), hidden, steps=8, lifelong=[PackNet()], progress=False)
    blurred = stream(tasks(), "points", scenario="domain", reveals=[])
    for method in (EWC(), GEM(memory=8), AGEM(memory=8)):
        with pytest.raises(SettingError, match="when a task ends"):
            rl.train(learner(), blurred, steps=8, lifelong=[method], progress=False)
    rl.train(learner(), blurred, steps=8, lifelong=[Replay(size=6)], progress=False)  # needs nothing


@pytest.mark.parametrize("method", [EWC(), GEM(), AGEM(), Replay()], ids=lambda m: m.name)
def test_a_learner_without_a_distribution_is_refused_before_training(method, tmp_path):
    with pytest.raises(SettingError, match="DQN gives no distribution"):
        rl.train(rl.DQN(learning_starts=32), "cartpole-conflicts", steps=64, lifelong=[method], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def begun(run, metrics):
    raise AssertionError("training has begun")


def test_a_memory_larger_than_the_data_is_refused_before_training():
    for method in (GEM(memory=41), AGEM(memory=41)):
        with pytest.raises(SettingError, match="41 samples a task is more than the 40"):
            trained(method)
    small = dataclasses.replace(tasks()[1], train=Samples(*(x[:9] for x in tasks()[1].train)))
    for order in ("given", 2):  # not found out when its turn comes, after others were trained on
        uneven = stream([tasks()[0], small], "uneven", order=order)
        with pytest.raises(SettingError, match="10 samples a task is more than the 9 that the smallest has"):
            rl.train(learner(), uneven, steps=8, lifelong=[GEM(memory=10)], callbacks=[begun], progress=False)
    with pytest.raises(SettingError, match="less than the 3 classes"):
        trained(Replay(size=2))


def test_memories_that_the_machine_has_no_room_for_are_refused_before_they_are_made():
    many = 10**13
    for problem, settings, methods in (
        (points(), learner(), [Replay(size=many), Replay(size=6, batch_size=many), AGEM(memory=8, batch_size=many)]),
        (conflicts(), agent(), [Replay(size=many), GEM(memory=many), AGEM(memory=many), EWC(samples=many)]),
    ):
        for method in methods:
            with pytest.raises(SettingError, match=r"samples of 1 learners take [\d,]+ GB, more than the [\d,]+ GB of"):
                rl.train(settings, problem, steps=8, lifelong=[method], callbacks=[begun])
    rl.train(learner(), points(), steps=8, lifelong=[EWC(samples=many)])  # a task has fewer: all of them


def test_settings_that_are_infinite_or_no_choice_are_refused():
    inf = float("inf")
    for make, words in (
        (lambda: Replay(strength=inf), "Replay: strength is inf, expected a number that is finite"),
        (lambda: Replay(strength=[1.0, inf]), r"Replay: strength is \[1.0, inf\], expected a number that is finite"),
        (lambda: GEM(margin=inf), "GEM: margin is inf"),
        (lambda: PackNet(retrain=inf), "PackNet: retrain is inf"),
        (lambda: rl.Classifier(learning_rate=inf), "Classifier: learning_rate is inf"),
        (lambda: rl.Regressor(weight_decay=inf), "Regressor: weight_decay is inf"),
        (lambda: EWC(fisher="Exact"), "EWC: fisher is 'Exact', expected one of"),
        (lambda: EWC(online="no"), "EWC: online is 'no', expected True or False"),
        (lambda: Replay(balance="klass"), "Replay: balance is 'klass', expected one of class, none"),
        (lambda: PackNet(critic=1), "PackNet: critic is 1, expected True or False"),
    ):
        with pytest.raises(SettingError, match=words):
            make()
    with pytest.raises(SettingError, match=r"1e\+39 is more than torch.float32 can hold"):
        rl.train(learner(), points(), steps=8, lifelong=[EWC(strength=1e39)], callbacks=[begun])


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"samples": 0}, {"decay": 2.0}])
def test_ewc_refuses_wrong_settings(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        EWC(**wrong)


def test_methods_are_named_on_the_command_line():
    from rlmeta.runs.user_code import build_method, methods_named

    assert methods_named("ewc, gem") == [EWC, GEM]
    assert build_method(EWC, {"strength": 5.0}) == EWC(strength=5.0)
    assert build_method(EWC, {"strength": "5,10", "samples": 20}) == EWC(strength=[5.0, 10.0], samples=20)
    with pytest.raises(
        SettingError, match=r"--ewc\.samples is '20,40', expected one value: learners of one batch share"
    ):
        build_method(EWC, {"samples": "20,40"})
    with pytest.raises(SettingError, match="strenght"):
        build_method(EWC, {"strenght": 5.0})
    with pytest.raises(rl.RlmetaError, match="did you mean ewc"):
        methods_named("ewcc")


# ---------------------------------------------------------------------- agents


def conflicts():
    return stream(["CartPole-v1", rl.task("CartPole-v1", settings={"force_mag": -10.0})], "conflict")


def agent() -> rl.PPO:
    return rl.PPO(num_envs=4, num_steps=16, batch_size=32, num_epochs=2, hidden_sizes=(8,))


SHORT = rl.Budget(steps=128, eval_episodes=1, final_episodes=1)


@functools.cache
def acted(*methods):
    return rl.train(agent(), conflicts(), budget=SHORT, seeds=2, lifelong=methods, progress=False)


@pytest.mark.parametrize("method", OFF, ids=repr)
def test_an_agents_method_that_is_switched_off_is_fine_tuning_bit_for_bit(method):
    assert torch.equal(flat(acted(method).state), flat(acted().state))


AGENTS = [
    EWC(strength=100.0, samples=32),
    GEM(memory=8),
    AGEM(memory=8, batch_size=8),
    Replay(size=16),
    *(L2(), SI(), MAS(samples=32), RWalk(), LwF(), PackNet(), HAT()),
]


@pytest.mark.parametrize("method", AGENTS, ids=lambda m: m.name)
def test_an_agents_method_works_on_its_policy(method):
    run = acted(method)
    assert torch.isfinite(flat(run.state)).all() and torch.isfinite(run.matrix).all()
    assert not torch.equal(flat(run.state), flat(acted().state))


@pytest.mark.parametrize("method", [*AGENTS[:4], PackNet(retrain=0.0)], ids=lambda m: m.name)
def test_a_stream_of_one_task_is_the_agent_alone(method):
    plain = rl.train(agent(), "CartPole-v1", budget=SHORT, seeds=2, progress=False)
    run = rl.train(agent(), stream(["CartPole-v1"], "one"), budget=SHORT, seeds=2, lifelong=[method], progress=False)
    assert torch.equal(flat(run.state), flat(plain.state))


@pytest.mark.parametrize("method", AGENTS[:-1], ids=lambda m: m.name)  # HAT refuses them
def test_methods_work_on_box_actions(method):
    twice = stream(["Pendulum-v1"] * 2, "twice")
    run = rl.train(agent(), twice, budget=SHORT, seeds=2, lifelong=[method], progress=False)
    assert torch.isfinite(flat(run.state)).all()


def test_methods_compose():
    run = trained(EWC(strength=10.0), GEM(memory=8), Replay(size=6))
    assert set(run.state["methods"]) == {"ewc", "gem", "replay"}
    other = trained(Replay(size=6), GEM(memory=8), EWC(strength=10.0))
    assert not torch.equal(flat(run.state), flat(other.state))  # a penalty before a projection is projected, too

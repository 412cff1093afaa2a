"""Settings: lists compare, static values group, wrong values are refused with a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from rlmeta.agents import A2C, DQN, PPO, REINFORCE
from rlmeta.api import train
from rlmeta.errors import SettingError
from rlmeta.learning.settings import (
    LearnerSettings,
    check_choices,
    check_names,
    difference,
    group,
    hyper_tensors,
    merge,
    per_learner_names,
    variants,
)


def test_lists_multiply_and_become_tensors_variant_by_variant():
    both = variants(PPO(learning_rate=[1e-3, 1e-4], gamma=[0.9, 0.99]))
    assert [(one.learning_rate, one.gamma) for one in both] == [(1e-3, 0.9), (1e-3, 0.99), (1e-4, 0.9), (1e-4, 0.99)]
    hyper = hyper_tensors(both, 2)
    assert torch.equal(hyper["gamma"], torch.tensor([0.9, 0.9, 0.99, 0.99] * 2))
    assert set(hyper) == set(per_learner_names(PPO))
    assert difference(both[1], both) == "learning_rate=0.001, gamma=0.99"
    assert difference(both[0], both[:1]) == ""


def test_static_values_split_into_groups_and_merge_keeps_the_lists():
    given = [PPO(num_steps=128), PPO(num_steps=256), PPO(num_steps=128, gamma=0.5)]
    groups = group(given)
    assert [[one.gamma for one in members] for members in groups] == [[0.99, 0.5], [0.99]]
    assert merge(groups[0]).gamma == (0.99, 0.5)
    assert merge(groups[1]) == given[1]


@pytest.mark.parametrize("cls", [PPO, A2C, DQN, REINFORCE])
@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("learning_rate", -1e-3), ("gamma", 1.5), ("num_envs", 0), ("gamma", math.nan)],
)
def test_values_out_of_range_are_refused_by_name_and_value(cls, name, value):
    with pytest.raises(SettingError, match=f"{name} is"):
        cls(**{name: value})


def test_one_wrong_value_in_a_list_is_refused():
    with pytest.raises(SettingError, match="learning_rate is -1"):
        PPO(learning_rate=[1e-3, -1.0])
    for given in ("3e-4", [1e-3, "a"], None):
        with pytest.raises(SettingError, match=r"PPO: learning_rate is .*, expected a number"):
            PPO(learning_rate=given)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PPO(num_envs=8, num_steps=10, batch_size=64), "does not divide num_envs \\* num_steps = 80"),
        (lambda: DQN(capacity=10, num_envs=4, num_steps=4), "capacity 10 holds"),
        (lambda: DQN(learning_starts=100_000, capacity=50_000), "learning_starts 100000 is more than capacity"),
        (lambda: check_names(PPO, {"learning_rat": 1.0}, "here"), "learning_rate"),
    ],
)
def test_contradictions_are_refused_with_a_sentence(make, words):
    with pytest.raises(SettingError, match=words):
        make()


@dataclass(frozen=True)
class Inside:
    """Settings with another learner's inside."""

    learner: LearnerSettings = None
    switch: bool = False


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: PPO(learning_rate_schedule="cosinus"),
            "PPO: learning_rate_schedule is 'cosinus', expected one of constant, lin",
        ),
        (lambda: Inside(switch="yes"), "Inside: switch is 'yes', expected True or False"),
        (lambda: Inside(learner=Inside(switch="no")), "Inside: switch is 'no', expected True or False"),
        (lambda: Inside(learner=PPO(penalty="none")), "PPO: penalty is 'none', expected one of clip, kl"),
    ],
)
def test_values_that_are_no_choice_are_refused(make, words):
    with pytest.raises(SettingError, match=words):
        check_choices(make())
    check_choices(Inside(learner=PPO(penalty="kl"), switch=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_steps": 8.5}, r"num_steps is 8\.5, expected a whole number"),
        ({"num_steps": [8, 16]}, r"num_steps is \[8, 16\], expected one number: a list compares settings that are per"),
        ({"learning_rate": []}, r"learning_rate is \[\], expected a number, or some to compare"),
    ],
)
def test_counts_are_single_whole_numbers(given, words):
    with pytest.raises(SettingError, match=words):
        PPO(**given)


@pytest.mark.parametrize("strange", [PPO, [PPO(), PPO()], None])
def test_what_is_no_agents_settings_is_refused(strange):
    with pytest.raises(SettingError, match=r"agent is .*, expected the settings of one, such as PPO\(\)"):
        train(strange, "CartPole-v1", steps=8)


def test_choices_are_looked_at_before_a_run(tmp_path):
    with pytest.raises(SettingError, match="learning_rate_schedule is 'cosinus'"):
        train(PPO(learning_rate_schedule="cosinus"), "CartPole-v1", steps=8, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_whole_number_that_no_float_can_hold_is_refused():
    with pytest.raises(SettingError, match="learning_rate is a int, expected a number"):
        PPO(learning_rate=10**400)

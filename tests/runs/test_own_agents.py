"""An agent of one's own, agents/my_agent.py: it trains, is killed and resumed; no folder loads it by itself."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.envs import user_modules
from rlmeta.errors import SettingError, UnknownNameError
from rlmeta.functional.packed import Packed
from rlmeta.runs import grammar
from rlmeta.runs.shipped import agent_class
from tests.runs.killer import Killer
from tests.runs.test_resume import assert_same_run

ROOT = Path(rl.__file__).parents[1]
SMALL = {"num_envs": 2, "num_steps": 16, "hidden_sizes": (8,)}
BUDGET = {"steps": 640, "eval_every": 160, "eval_episodes": 2, "final_episodes": 2, "checkpoint_seconds": 0.0}
FLAGS = "--num-envs 2 --hidden-sizes 8 --steps 64 --final-episodes 2 --quiet"


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with a copy of the template in a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mypkg").mkdir()
    Path("mypkg/__init__.py").touch()
    shutil.copy(ROOT / "agents/my_agent.py", "mypkg/mine.py")
    yield tmp_path
    for name in ("my_agent", "mypkg", "mypkg.mine"):
        sys.modules.pop(name, None)


def settings(**values: object) -> object:
    return agent_class("mypkg.mine:MyAgent")(**{**SMALL, **values})


def train_in(project: str, out: str, kill_at: int = 0) -> rl.Run:
    """Train in a project; killed without warning where asked."""

    def kill(run: rl.Run, line: dict[str, object]) -> None:
        if kill_at and line["iteration"] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.chdir(project)
    compared = settings(learning_rate=[1e-3, 3e-3])
    return rl.train(compared, "CartPole-v1", seeds=2, out=out, callbacks=[kill], threads=1, **BUDGET)


def test_killed_and_resumed_equals_never_stopped(tmp_path: Path, killer: Killer) -> None:
    whole = train_in(str(tmp_path), "whole")
    killer.kill("tests.runs.test_own_agents:train_in", str(tmp_path), "killed", 10)
    with pytest.raises(SettingError, match=r"had the agent mypkg\.mine:MyAgent: pass it again as agent= \(on the"):
        rl.resume("killed")
    assert_same_run(whole, rl.resume("killed", code=["mypkg.mine"]))


def test_the_command_line_names_it_and_is_told_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(f"train mypkg.mine:MyAgent CartPole-v1 --learning-rate 1e-3,1e-2 {FLAGS} --out run".split()) == 0
    capfd.readouterr()
    assert main(["resume", "run"]) == 2
    said = capfd.readouterr().err
    assert "pass it again as agent= (on the command line --agent), or allow the module" in said
    assert said.count("\n") == 1 and "--code mypkg.mine" in said
    for again in ("--code mypkg.mine", "--code mypkg", "--agent mypkg.mine:MyAgent"):
        assert main(f"resume run {again}".split()) == 0
        assert main(f"eval run --episodes 2 {again}".split()) == 0
    assert main(f"train mypkg.mine:MyAgent CartPole-v1 --num-steps 8,16 {FLAGS} --out two".split()) == 0
    assert main(["resume", "two"]) == 2 and "'mypkg.mine'" in capfd.readouterr().err
    assert main(["resume", "two", "--code", "mypkg.mine"]) == 0


def test_loading_gives_the_same_run() -> None:
    run = rl.train("mypkg.mine:MyAgent", "CartPole-v1", steps=128, final_episodes=2, out="run")
    cls = type(run.experiment.variants[0])
    for again in ({"agent": cls}, {"agent": "mypkg.mine:MyAgent"}, {"code": ["mypkg.mine"]}):
        loaded = rl.load("run", **again)
        assert loaded.experiment.variants == run.experiment.variants
        assert (loaded.scores == run.scores).all() and loaded.summary()[0]["agent"] == "my_agent"
    with pytest.raises(SettingError, match=r"had the agent mypkg\.mine:MyAgent, got PPO: give the same"):
        rl.load("run", agent=rl.PPO)
    with pytest.raises(SettingError, match=r"agent mypkg\.mine:MyAgent is MyAgent\(.*, expected the class of an"):
        rl.load("run", agent=cls())


def test_the_template_needs_no_path_and_learns_the_template_environment() -> None:
    run = rl.train("my_agent:MyAgent", "my_env:MyEnv-v0", steps=256, final_episodes=2, out="run")
    assert run.scores.isfinite().all()
    assert rl.load("run", code=["my_agent", "my_env"]).scores.isfinite().all()


def test_code_is_found_where_its_name_was() -> None:
    """As in another process, which has imported nothing of it."""
    rl.train("my_agent:MyAgent", "CartPole-v1", steps=256, final_episodes=2, out="run")
    del sys.modules["my_agent"]
    sys.path[:] = [entry for entry in sys.path if not entry.startswith(user_modules.PREFIX)]
    with pytest.raises(SettingError, match="had the agent my_agent:MyAgent: pass it again"):
        rl.load("run")
    assert rl.load("run", code=["my_agent"]).scores.equal(rl.load("run", code="my_agent").scores)


def test_lifelong_methods_take_it() -> None:
    twice, methods = rl.stream(["CartPole-v1"] * 2, "twice"), [rl.EWC(strength=10.0, samples=8), rl.Replay(size=8)]
    run = rl.train(settings(), twice, steps=64, lifelong=[*methods, rl.PackNet()], final_episodes=2)
    assert run.matrix[:, -1].isfinite().all()
    owner = Packed.view(run.state["methods"]["packnet"]["owner"], run.state["params"]["weights"], 1)
    packed = {name.partition(".")[0] for name, entries in owner.items() if (entries >= 0).any()}
    assert packed == {"policy"}


def test_a_meta_learner_takes_it_for_its_inner_learner(capfd: pytest.CaptureFixture[str]) -> None:
    """Its settings in the words of the command line name it, and are read back where it is told again."""
    text = grammar.text_of(settings(num_steps=8))
    assert text == "mypkg.mine:MyAgent num_envs=2 num_steps=8 hidden_sizes=8"
    assert grammar.learner(text) == settings(num_steps=8)


def test_names_in_a_call_are_the_callers_own_words() -> None:
    Path("mypkg/more.py").write_text(
        "import rlmeta as rl\nfrom rlmeta.lifelong import Method\n"
        "class Mine(Method):\n    name = 'mine'\n"
        "def stream():\n    return rl.stream(['CartPole-v1', 'cartpole-long-pole'], name='two')\n"
    )
    small = rl.A2C(num_envs=2, hidden_sizes=(8,))
    rl.train(small, "mypkg.more:stream", steps=20, lifelong=["mypkg.more:Mine"], out="run", final_episodes=2)
    named = {"env": "mypkg.more:stream", "lifelong": ["mypkg.more:Mine"]}
    assert rl.load("run", **named).scores.isfinite().all()
    assert rl.resume("run", **named).scores.isfinite().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mypkg.mine:MyLearner", r"agent mypkg\.mine:MyLearner is <class .*, expected the class of an"),
        ("mypkg.mine:MyAgnt", r"mypkg\.mine has no 'MyAgnt': did you mean MyAgent"),
        ("mypkg.none:MyAgent", r"no module 'mypkg\.none' can be imported"),
    ],
)
def test_what_is_no_agent_is_refused_in_a_sentence(name: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        rl.train(name, "CartPole-v1", steps=64)
    with pytest.raises(UnknownNameError, match="unknown agent 'pop': did you mean ppo"):
        rl.train("pop", "CartPole-v1", steps=64)


def test_a_class_that_shares_only_its_name_with_one_of_rlmetas_has_no_preset() -> None:
    Path("mypkg/other.py").write_text(Path("mypkg/mine.py").read_text().replace("MyAgent", "PPO"))
    assert main(f"train mypkg.other:PPO CartPole-v1 {FLAGS} --out run".split()) == 0
    Path("agents").mkdir()
    Path("agents/my_agent.toml").write_text('["CartPole-v1"]\nnum_steps = 3\n')
    assert rl.preset("mypkg.mine:MyAgent", "CartPole-v1").num_steps == 3

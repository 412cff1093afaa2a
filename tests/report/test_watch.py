"""Films of runs: their episodes are those of an evaluation, a picture a step, natively and of gymnasium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

import rlmeta as rl
from rlmeta.cli.main import main
from rlmeta.envs.native.drawing import Picture
from rlmeta.errors import EnvironmentFailedError, MissingExtraError, RunExistsError, SettingError, SpaceError
from rlmeta.report.film import write_film

SMALL: dict[str, Any] = {"num_envs": 2, "num_steps": 8, "batch_size": 8, "num_epochs": 1, "hidden_sizes": (4,)}


def trained(problem: Any, seeds: int = 2, out: Path | None = None, **settings: Any) -> rl.Run:
    budget = rl.Budget(steps=16, eval_episodes=2, final_episodes=2)
    return rl.train(rl.PPO(**{**SMALL, **settings}), problem, budget=budget, seeds=seeds, out=out)


def shown(film: Path) -> tuple[int, int]:
    """Number of different pictures in a row in a GIF, and the milliseconds that it lasts."""
    with Image.open(film) as image:
        durations = []
        for frame in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(frame)
            durations.append(image.info["duration"])
    return len(durations), sum(durations)


def problems() -> dict[str, tuple[Any, dict[str, Any]]]:
    short = rl.task("CartPole-v1", max_episode_steps=9)
    stream = rl.stream([rl.task("CartPole-v1", settings={"gravity": g, "max_episode_steps": 9}) for g in (9.8, 20.0)])
    poles = rl.trials(rl.TaskFamily("poles", short, {"length": (0.3, 0.9)}), episodes=2)
    return {
        "native": (short, {"normalise_observation": True}),
        "gymnasium": (rl.task("CartPole-v1", native=False, max_episode_steps=9), {}),
        "continuous": (rl.task("MountainCarContinuous-v0", max_episode_steps=6), {}),
        "pictures": ("Catch-v0", {}),
        "random steps": ("MinAtar/Breakout-v1", {}),
        "memory": (rl.task("TMaze-v0", settings={"corridor_length": 6}), {"memory": "gru", "batch_size": 16}),
        "dictionary": (rl.task("PointReach-v0", settings={"max_episode_steps": 5}), {}),
        "trials": (poles, {}),
        "stream": (stream, {}),
    }


@pytest.mark.parametrize("name", problems())
def test_a_film_has_a_picture_of_every_step_of_an_evaluation(name: str, tmp_path: Path) -> None:
    problem, settings = problems()[name]
    run = trained(problem, **settings)
    film = tmp_path / "film.gif"
    watched = rl.watch(run, film, episodes=2, learner=1, seed=3, fps=10, deterministic=name != "random steps")
    evaluation = run.evaluate(2, seed=3, deterministic=name != "random steps")
    assert torch.equal(watched.returns, evaluation.returns[1])
    assert torch.equal(watched.lengths, evaluation.lengths[1])
    assert watched.frames == int(watched.lengths.sum()) + len(watched.lengths)
    different, duration = shown(film)
    assert 1 < different <= watched.frames and duration == 100 * watched.frames


def test_the_best_learner_is_watched_and_the_film_lies_in_the_runs_folder(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("av")
    import av

    run = trained("Catch-v0", seeds=3, out=tmp_path / "run")
    assert main(["watch", str(tmp_path / "run"), "--episodes", "2", "--seed", "5"]) == 0
    film = tmp_path / "run/videos/watch.mp4"
    said = capsys.readouterr().out
    returns = run.evaluate(2, seed=5).returns[run.best_learner]
    assert all(f"episode {i}: return {value:g}, 9 steps" in said for i, value in enumerate(returns.tolist()))
    assert f"learner {run.best_learner}, 20 pictures, saved in {film}" in said
    with av.open(str(film)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) == 20 and pictures[0].shape == (400, 200, 3)
    balls = [np.argwhere((p[20::40, 20::40, 0] > 150) & (p[20::40, 20::40, 2] < 80))[:, 0] for p in pictures]
    assert [rows.tolist() for rows in balls] == [[i] for i in range(10)] * 2  # to the last row, then from the first
    assert [path.name for path in film.parent.iterdir()] == ["watch.mp4"]
    assert main(["watch", str(tmp_path / "run")]) == 0  # the film of before is derived, and made anew


def test_an_odd_picture_keeps_its_size_in_a_gif_and_is_made_even_in_an_mp4(tmp_path: Path) -> None:
    pytest.importorskip("av")
    import av

    frames = [np.full((41, 63, 3), 9 * i, np.uint8) for i in range(5)]
    assert write_film(tmp_path / "a.mp4", frames, 7) == write_film(tmp_path / "a.gif", frames, 10) == 5
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 7
        assert [(frame.height, frame.width) for frame in container.decode(video=0)] == [(42, 64)] * 5
    with Image.open(tmp_path / "a.gif") as image:
        assert image.size == (63, 41)


def test_a_film_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def frames() -> Any:
        yield np.zeros((4, 4, 3), np.uint8)
        yield np.zeros((4, 6, 3), np.uint8)

    with pytest.raises(SettingError, match="one size"):
        write_film(tmp_path / "a.gif", frames(), 10)
    assert list(tmp_path.iterdir()) == []


def test_another_task_with_the_same_spaces_may_be_played(tmp_path: Path) -> None:
    run = trained(rl.task("PointReach-v0", max_episode_steps=3))
    larger = rl.task("PointReach-v0", settings={"radius": 0.3, "max_episode_steps": 2})
    assert rl.watch(run, tmp_path / "own.gif").lengths.tolist() == [3]
    assert rl.watch(run, tmp_path / "larger.gif", task=larger).lengths.tolist() == [2]
    with Image.open(tmp_path / "own.gif") as own, Image.open(tmp_path / "larger.gif") as other:
        green = [int((np.asarray(image.convert("RGB"))[..., 0] < 20).sum()) for image in (own, other)]
    assert 10 * green[0] < green[1]
    with pytest.raises(SpaceError, match=r"'Catch-v0' has the spaces .* give a task with the same"):
        rl.watch(run, tmp_path / "b.gif", task="Catch-v0")


# ------------------------------------------------------------------------------------------- what cannot be drawn


class Square(gym.Env[Any, Any]):
    """Draws its count; without seeds, if `forgets`, it goes on otherwise every time."""

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 7}  # noqa: RUF012 - as gymnasium declares it
    observation_space = gym.spaces.Box(0, 9, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)
    drawn = 0

    def __init__(self, render_mode: str | None = None, forgets: bool = False) -> None:
        self.render_mode, self.forgets = render_mode, forgets

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        reward = np.random.default_rng().random() if self.forgets else 1.0
        return np.full(1, self.count, np.float32), reward, self.count >= 4, False, {}

    def render(self) -> Picture:  # type: ignore[override]
        Square.drawn += 1
        return np.full((8, 8, 3), 20 * self.count, np.uint8)


def test_a_function_is_told_the_render_mode(tmp_path: Path) -> None:
    run = trained(rl.task(Square, name="square"))
    assert rl.watch(run, tmp_path / "a.gif", episodes=3).frames == 15
    assert shown(tmp_path / "a.gif")[0] == 15
    with pytest.raises(SettingError, match=r"render mode None and knows rgb_array, human.*parameter render_mode"):
        rl.watch(trained(rl.task(lambda: Square(), name="square")), tmp_path / "b.gif")


def test_an_environment_that_goes_on_otherwise_is_not_drawn(tmp_path: Path) -> None:
    def make(render_mode: str | None = None) -> Square:
        return Square(render_mode, forgets=True)

    with pytest.raises(EnvironmentFailedError, match="'Square' went on otherwise after 0 steps"):
        rl.watch(trained(rl.task(make, name="square")), tmp_path / "a.gif")
    assert list(tmp_path.iterdir()) == []


def test_a_vector_environment_is_not_drawn(tmp_path: Path) -> None:
    task = rl.task(lambda num_envs: gym.vector.SyncVectorEnv([Square] * num_envs), name="squares")
    with pytest.raises(SettingError, match=r"vector environment.*--task"):
        rl.watch(trained(task), tmp_path / "a.gif")


def test_what_cannot_be_watched_is_said_before_anything_is_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("Catch-v0")
    (tmp_path / "there.gif").touch()
    for out, error, match in (
        ("a.avi", SettingError, r"ends in '\.avi', expected \.mp4 or \.gif"),
        ("there.gif", RunExistsError, "exists"),
        (None, SettingError, "a run in memory has no folder for a film"),
    ):
        with pytest.raises(error, match=match):
            rl.watch(run, None if out is None else tmp_path / out)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"needs av, which is not installed: pip install 'rlmeta\[video\]'"):
        rl.watch(run, tmp_path / "a.mp4")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingError, match="there is no display"):
        rl.watch(run, live=True)
    learner = rl.MAML(rl.Regressor(hidden_sizes=(4,)), num_envs=1)
    adapting = rl.train(learner, "sinusoid", budget=rl.Budget(steps=1, final_episodes=1))
    with pytest.raises(SettingError, match="a run of maml does not act"):
        rl.watch(adapting, tmp_path / "a.gif")


@pytest.mark.parametrize("problem", ["Catch-v0", rl.task(Square, name="square")])
def test_a_window_shows_the_episodes(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SDL's driver without a screen; a gymnasium environment draws in its own window."""
    monkeypatch.setenv("DISPLAY", ":0")
    run, before = trained(problem), Square.drawn
    watched = rl.watch(run, live=True, fps=1000)
    assert watched.out is None and watched.frames == int(watched.lengths.sum()) + 1
    assert Square.drawn - before == (0 if problem == "Catch-v0" else 5)
    with pytest.raises(SettingError, match=r"live shows a window and out is a film, a\.gif"):
        rl.watch(run, "a.gif", live=True)

"""Types: a user's own type checker sees rlmeta's (py.typed)."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAM = """
import rlmeta as rl
run = rl.train(rl.PPO(), "CartPole-v1")
reveal_type(run)
reveal_type(run.scores)
rl.PPO(num_envs="eight")
"""


def test_a_users_type_checker_sees_run_and_wrong_settings(tmp_path: Path) -> None:
    """In an environment that has rlmeta among its site-packages; mypy does not see an editable install's."""
    venv.create(tmp_path / "env", with_pip=False)
    places = f"{ROOT}\n{sysconfig.get_path('purelib')}\n"
    next((tmp_path / "env" / "lib").glob("python3*/site-packages")).joinpath("places.pth").write_text(places)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    python = str(tmp_path / "env" / "bin" / "python")
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", str(tmp_path), str(program)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    assert 'Revealed type is "rlmeta.runs.run.Run"' in said, said
    assert 'Revealed type is "torch._tensor.Tensor"' in said, said
    assert 'incompatible type "str"; expected "int"' in said, said


def test_the_wheel_has_types_license_settings_and_templates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, cwd=tmp_path)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    ends = ("rlmeta/py.typed", "licenses/LICENSE", "rlmeta/agents/ppo.toml", "rlmeta/envs/my_env.py")
    assert all(any(name.endswith(end) for name in names) for end in ends), names

"""Flags of `rlmeta train` besides the agent's settings and the budget, and its help texts."""

from __future__ import annotations

from dataclasses import dataclass

from rlmeta.envs.gymnasium.rows import WORKER_TIMEOUT

AGENT_AND_TASK = """  AGENT   one that `rlmeta list agents` shows, or your own as package.module:MyAgent;
          `rlmeta train AGENT --help` shows its settings
  TASK    what `rlmeta list tasks`, families or streams shows, a gymnasium id, envpool:NAME, package.module:MyEnv-v0,
          or package.module:name of your own environment, stream or family, or of a function that makes one
  flags   settings of the agent, of the budget and of the run; --env.KEY VALUE for the environment"""

ABOUT = """Train an agent, all seeds and settings at once. A comma compares: --learning-rate 1e-4,1e-3 trains every seed
with both; in a setting that is not per learner it makes groups that run one after another. 100k, 1M and 1e6 are
numbers, --x and --no-x are switches, --env.KEY VALUE is an argument of the environment. Defaults are the preset's."""


@dataclass(frozen=True)
class Options:
    """Options of the run."""

    seeds: str = "1"
    """How many learners of each setting (16), or which seeds (100-115, 3,5,7, both together: 0,100-102; one seed with a
    comma behind it)."""
    out: str | None = None
    """The folder of the run; runs/AGENT-TASK-N, with the first free N, unless given."""
    preset: str = "auto"
    """A preset's file or name, the task whose settings to take, none, or auto for the task's own."""
    init: str = ""
    """Initialise weights and normalisation statistics from the run in this folder: learner by learner if it has
    equally many, else all from its best learner."""
    async_: bool = False
    """Run gymnasium's environments in worker processes."""
    worker_timeout: float = WORKER_TIMEOUT
    """With --async, seconds that one call of an environment may take."""
    max_episode_steps: int | None = None
    """Truncate episodes after this many steps, if the environment declares no limit or a longer one."""
    native: bool = True
    """Use rlmeta's own batched environment if there is one for the task."""
    threads: int = 0
    """Threads for torch; 0 chooses."""
    device: str = "cpu"
    """Device of all tensors: cpu, cuda, cuda:1."""
    video_every: int = 0
    """Film the best learner after the first evaluation of every so many steps, into the run's folder; 0 for never."""
    tensorboard: bool = False
    """Write TensorBoard's files into the run's folder."""
    wandb: bool = False
    """Log to Weights & Biases, one W&B run for each learner."""
    wandb_project: str = "rlmeta"
    """The W&B project."""
    quiet: bool = False
    """No live progress and no header."""
    lifelong: str = ""
    """Lifelong methods that work together on a stream of tasks (ewc,replay), of those that `rlmeta list methods` shows
    with their settings, or your own as package.module:MyMethod; --ewc.strength 100 sets one."""
    population: str = ""
    """Replace worse learners by copies of better ones, among the settings that are compared: pbt, population-based
    training (--pbt.every 20k, --pbt.fraction 0.25), or your own as package.module:MyPopulation."""
    order: str = "given"
    """Order of a stream's tasks: given, all, or how many different orders; every order is a learner."""
    scenario: str = ""
    """Scenario of a stream of samples, which says what is known of the classes: task, domain or class; by default as
    its file says."""
    restart_optimizer: bool = True
    """Reset the optimizer's moments at every task boundary that a stream reveals."""


@dataclass(frozen=True)
class Code:
    """Your own code, which files may name."""

    code: str = ""
    """Modules that a preset or a file of the envs folders may name and so import: package.module, joined by commas."""

"""Your own agent. Copy this file and change it; `python agents/my_agent.py` trains it a little.

rlmeta train my_agent:MyAgent CartPole-v1 --seeds 4 --steps 100k --out runs/mine
rlmeta resume runs/mine --code my_agent

A small actor-critic: every short rollout is one step of Adam down the gradient of

    -E[log pi(a|s) A] + c_v E[(V(s) - G)^2] - c_h E[entropy(pi(.|s))],   G the lambda-return, A = G - V(s)
"""

from dataclasses import dataclass
from typing import Any

import torch

import rlmeta as rl
from rlmeta.functional import losses, optim, returns
from rlmeta.functional.axes import align
from rlmeta.learning.minibatch import flatten_time
from rlmeta.learning.optimizer_state import init_optimizer
from rlmeta.learning.settings import PerLearner, require_range
from rlmeta.learning.step import step
from rlmeta.nn import MLP, Encoder, Sequential, ValueHead, bare, head_for


@dataclass(frozen=True)
class MyAgent:
    """What may be set, also as flags; the text below a field is the flag's help."""

    num_envs: int = 8
    """Environments of each learner; every agent has it."""
    num_steps: int = 16
    """Steps in every environment between updates."""
    learning_rate: PerLearner = 3e-3
    """Adam's step size; a list for what is per learner compares its values."""
    gamma: PerLearner = 0.99
    """Discount factor."""
    lambda_: PerLearner = 0.95
    """How far G looks ahead: 0 one step, 1 to the end of the episode."""
    value_coefficient: PerLearner = 0.5
    """c_v."""
    entropy_coefficient: PerLearner = 0.01
    """c_h."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""

    def __post_init__(self) -> None:
        require_range(self, "learning_rate", 0.0, above=True)
        for name in ("gamma", "lambda_"):
            require_range(self, name, 0.0, 1.0)
        for name in ("num_envs", "num_steps"):
            require_range(self, name, 1)

    def bind(self, observation_space: Any, action_space: Any, methods: Any = ()) -> "MyLearner":
        """Create the agent for an observation and an action space."""
        return MyLearner(self, observation_space, action_space, methods)


class MyLearner(rl.Agent):
    """Act, credit, learn, for all learners `*L` at once; whatever changes is in the state that is handed on."""

    def __init__(self, settings: MyAgent, observation_space: Any, action_space: Any, methods: Any = ()) -> None:
        super().__init__(settings, observation_space, action_space, methods)
        self.steps_per_iteration = settings.num_steps
        self.blocks: Any = bare(self.networks)  # their form alone: the weights are in the state
        self.policy = self.blocks["policy"]  # whose distribution lifelong methods ask for
        self.head = self.policy.get_submodule("2")

    def networks(self) -> dict[str, Any]:
        """Build the networks of one learner; the first one chooses actions."""
        encoder, sizes = Encoder(self.observation_space), self.settings.hidden_sizes
        heads = {"policy": head_for(self.action_space, sizes[-1]), "value": ValueHead(sizes[-1])}
        return {name: Sequential(encoder, MLP(encoder.features, sizes), head) for name, head in heads.items()}

    def init(self, key: Any, hyper: Any, world: Any) -> dict[str, Any]:
        """Initial state; whatever else is to last goes into it, every tensor `[*L, ...]`."""
        state = super().init(key, hyper, world)
        return {**state, "optimizer": init_optimizer(optim.adam(hyper["learning_rate"]), state)}

    def run(self, name: str, p: Any, observation: Any, ctx: Any = None) -> Any:
        """Forward pass of a network on observations `[*L, ...]`."""
        return self.forward(self.blocks[name], name, p, observation, ctx)

    def act(self, p: Any, observation: Any, memory: Any, key: Any, deterministic: bool = False) -> Any:
        """Choose actions `[*L, N, ...]`, a sample or the mode; all randomness comes from the key."""
        distribution = self.run("policy", p, observation)
        return self.head.mode(distribution) if deterministic else self.head.sample(distribution, key), memory

    @torch.no_grad()
    def credit(self, p: Any, rollout: Any, reward: Any) -> dict[str, Any]:
        """Returns G and advantages A of every step `[*L, T, N]`; settings `[*L]` meet data through `align`."""
        value, following = (self.run("value", p, rollout[name]) for name in ("observation", "next_observation"))
        discount = align(p["hyper"]["gamma"], reward) * ~rollout["terminated"]  # a truncated step bootstraps
        cut = rollout["terminated"] | rollout["truncated"] | ~rollout["valid"]
        target = returns.lambda_return(reward, discount, following, cut, p["hyper"]["lambda_"])
        kept = {name: rollout[name] for name in ("observation", "action", "valid")}
        return {**kept, "return": target, "advantage": target - value}

    def losses(self, p: Any, batch: Any, ctx: Any) -> dict[str, Any]:
        """Compute the losses `[*L]` of samples `[*L, B, ...]`."""
        h, valid, distribution = p["hyper"], batch["valid"], self.run("policy", p, batch["observation"], ctx)
        log_prob = self.head.log_prob(distribution, batch["action"])
        policy = losses.policy_gradient_loss(log_prob, batch["advantage"], valid)
        value = losses.value_loss(self.run("value", p, batch["observation"], ctx), batch["return"], valid)
        entropy = losses.entropy_loss(self.head.entropy(distribution), valid)
        ctx.info.update({"losses/policy_loss": policy, "losses/value_loss": value})  # into metrics.jsonl
        return {"policy": policy + h["entropy_coefficient"] * entropy, "value": h["value_coefficient"] * value}

    def update(self, state: Any, rollout: Any, rewards: Any) -> Any:
        """Take one gradient step on the whole rollout; returns the new state and metrics `[*L]`."""
        p = self.effective_params(state)
        batch = flatten_time(self.credit(p, rollout, sum(rewards.values())), state["key"].dim())
        adam = optim.adam(p["hyper"]["learning_rate"])
        return step(self, state, batch, adam, max_grad_norm=0.5, methods=self.methods)


if __name__ == "__main__":
    run = rl.train(MyAgent(learning_rate=[1e-3, 3e-3]), "CartPole-v1", steps=40_000, seeds=2)
    print([(row["setting"], row["scores"]) for row in run.summary()])

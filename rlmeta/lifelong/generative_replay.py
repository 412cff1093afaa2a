"""Deep generative replay (Shin et al., 2017): rehearsal of samples that a generative model draws of old tasks.

A scholar is a solver, the learner, and a generator, here a conditional variational autoencoder (`nn.generative.vae`):

    solver:     L(minibatch) + strength · L(x', y'),   x' ~ p_old(x | y'),  y' uniform over the classes met so far
    generator:  - ELBO of the minibatch and of as many x', in a phase of its own after the solver's

x' are drawn by the generator as it was when the last task ended. The paper lets the old solver say y'; a condition
says it here, so that every old class is drawn as often as any other. No old sample is kept.

The generator's weights are an owner's (`learning.owners`): none of the learner's numbers depends on them where
strength is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor

from rlmeta.data.samples import HIDDEN
from rlmeta.engine.capture import Capture
from rlmeta.functional import optim, random, tree
from rlmeta.learning import owners
from rlmeta.learning.gradients import StepContext
from rlmeta.learning.method import Draw, Learned, Memory, Method, Task
from rlmeta.learning.minibatch import gather
from rlmeta.learning.settings import PerLearner, check_choices, require, require_finite, require_range, values_of
from rlmeta.learning.state import Params, State
from rlmeta.lifelong.recall import per_learner
from rlmeta.nn import Block, Context, bare
from rlmeta.nn.encoder import byte_bound
from rlmeta.nn.generative.vae import ConditionalVAE, negative_elbo


@dataclass(frozen=True)
class GenerativeReplay(Method):
    """Settings of generative replay, and the method itself."""

    strength: PerLearner = 1.0
    """Weight of the loss on generated samples, as many as in the minibatch, beside the learner's own loss."""
    generator: float = 1.0
    """Iterations of the generator's training phase, as a fraction of the learner's."""
    learning_rate: PerLearner = 1e-3
    """Adam's step size for the generator."""
    latent: int = 16
    """Dimensions of the latent space."""
    hidden_sizes: tuple[int, ...] = (128,)
    """Widths of the encoder's hidden layers; the decoder's are the same in reverse."""

    name = "generative_replay"
    recordable = True
    needs = frozenset({"boundaries"})

    def __post_init__(self) -> None:
        check_choices(self)
        require_range(self, "strength", 0.0)
        require_range(self, "generator", 0.0, above=True)
        require_range(self, "learning_rate", 0.0, above=True)
        require_finite(self, "strength", "generator", "learning_rate")
        require_range(self, "latent", 1)

    @property
    def _idle(self) -> bool:
        """Whether the weight is 0 for every learner."""
        return not any(values_of(self.strength))

    def phases(self, iterations: int) -> Sequence[tuple[str, int]]:
        """Training phase of the generator, after the learner's."""
        return [] if self._idle else [("generator", max(1, round(self.generator * iterations)))]

    def init(self, learner: Any, state: State) -> Memory:
        """Initial memory: a generator with random weights, trained on no class yet.

        Raises:
            SettingError: a learner without classes, or inputs that are no bytes.
        """
        space = learner.observation_space
        require(
            learner.classes > 0, f"GenerativeReplay draws labelled samples: {type(learner).__name__} has no classes"
        )
        require(byte_bound(space) is not None, f"GenerativeReplay draws pictures of bytes (uint8), inputs are {space}")
        rate, key, classes = per_learner(self.learning_rate, state), owners.own_key(state, self.name), learner.classes
        vae = owners.init(self.generator_of(learner), key, optim.adam(rate))
        return {
            "vae": vae,
            "old": tree.map(torch.clone, dict(vae["params"]["weights"])),
            "allowed": torch.zeros(*key.shape, classes, classes, dtype=torch.bool, device=key.device),
            "met": torch.zeros(*key.shape, classes, dtype=torch.bool, device=key.device),
            "strength": per_learner(self.strength, state),
            "rate": rate,
        }

    def generator_of(self, learner: Any) -> Generator:
        """Build the generator for a learner's inputs and classes; its steps are recorded if the learner's are."""
        space, capture = learner.observation_space, learner.capture
        return Generator(space, (math.prod(space.shape), learner.classes, self.latent, self.hidden_sizes), capture)

    # ------------------------------------------------------------------ solver

    def batches(
        self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, key: Tensor
    ) -> Sequence[tuple[tree.Tree, float | Tensor]]:
        """Draw a minibatch of generated samples of old classes, as large as the learner's own."""
        if self._idle or not bool(m["met"].any()):
            return ()
        drawn, target = self.generator_of(learner).draw(m["old"], m["met"], batch["target"].shape[-1], key)
        pixels = (drawn["input"] * torch.as_tensor(byte_bound(learner.observation_space))).round().to(torch.uint8)
        more = {
            "observation": pixels.reshape(batch["observation"].shape),
            "target": target,
            "identity": torch.full_like(batch["identity"], HIDDEN),
        }
        if "allowed" in batch:
            more["allowed"] = gather(m["allowed"], target)
        return [(more, m["strength"])]

    # ------------------------------------------------------------------ generator

    def learn(self, learner: Any, p: Params, m: Memory, batch: tree.Tree, task: Task, active: Tensor) -> Learned | None:
        """Train the generator for a step, on the minibatch and as many samples of its snapshot."""
        vae, target = owners.packed(m["vae"]), batch["target"]
        shown = {"observation": batch["observation"], "target": target}
        shown["key"] = random.fold(vae["key"], vae["count"]["gradient_steps"])
        if bool(m["met"].any()):
            shown |= {"old": m["old"], "met": m["met"]}
        vae, reports = owners.train(self.generator_of(learner), vae, [shown], optim.adam(m["rate"]), active)
        classes = F.one_hot(target, learner.classes).bool()
        beside = batch["allowed"] if "allowed" in batch else torch.ones_like(classes)
        allowed = m["allowed"] | (classes.any(-2).unsqueeze(-1) & beside.any(-2, keepdim=True))
        return Learned({**m, "vae": vae, "allowed": allowed}, vae["active"], {"losses/generator": reports["elbo"]})

    def task_end(self, learner: Any, p: Params, m: Memory, task: Task, draw: Draw) -> tuple[Params, Memory]:
        """Take a snapshot of the generator, from which samples are drawn from now on, and of its classes."""
        old = tree.map(torch.clone, dict(m["vae"]["params"]["weights"]))
        return p, {**m, "old": old, "met": m["allowed"].any(-1)}


Sizes: TypeAlias = tuple[int, int, int, tuple[int, ...]]
"""Sizes of a generator: input entries, classes, latent dimensions, widths of the hidden layers."""


@lru_cache(maxsize=8)
def _network(sizes: Sizes) -> Any:
    """Build the generator's network without weights, cached since building takes longer than a gradient step."""
    return bare(lambda: {"vae": ConditionalVAE(*sizes)})["vae"]


class Generator:
    """Generator of replayed images: a conditional variational autoencoder (an owner, see `learning.owners`).

    Args:
        space: of a picture of bytes.
        sizes: of the network.
        capture: records its gradient steps; None does not.
    """

    def __init__(self, space: gym.Space, sizes: Sizes, capture: Capture | None = None) -> None:
        self.space, self.sizes, self.capture, self.vae = space, sizes, capture, _network(sizes)

    def networks(self) -> dict[str, Block]:
        """Build the network: `vae`, conditioned on the class."""
        return {"vae": ConditionalVAE(*self.sizes)}

    @torch.no_grad()
    def draw(
        self, weights: dict[str, Tensor], met: Tensor, count: int, key: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw `count` samples of the classes in the mask `met` `[*L, C]`, which are equally likely.

        Returns:
            `input` `[*L, count, D]` in [0, 1] and the `condition` they were drawn for; the classes `[*L, count]`.
        """
        ends = met.cumsum(-1)  # of a learner that stopped before it met any, all 0
        chosen = random.integers(key, "class", 0, (count,), ends[..., -1:].clamp(min=1))
        target = torch.searchsorted(ends, chosen, right=True).clamp(max=met.shape[-1] - 1)
        z = random.normal(key, "latent", 0, (count, self.vae.latent))
        condition = F.one_hot(target, met.shape[-1]).to(z.dtype)
        logits = self.vae.decode(weights, z, condition, Context(), "vae.")
        return {"input": logits.sigmoid(), "condition": condition}, target

    def losses(self, p: Params, batch: tree.Tree, ctx: StepContext) -> dict[str, Tensor]:
        """Generator loss: the negative evidence lower bound `[*L]` of labelled images and as many of the snapshot.

        Args:
            p: the weights.
            batch: `observation` and `target` `[*L, B, ...]`, the step's `key` `[*L]`, and after the first task the
                weights of the `old` generator and the classes that it has `met`.
            ctx: of the step.
        """
        target, key = batch["target"], batch["key"]
        pixels = batch["observation"].flatten(target.dim()) / torch.as_tensor(byte_bound(self.space))
        shown = {"input": pixels, "condition": F.one_hot(target, self.sizes[1]).to(pixels.dtype)}
        if "old" in batch:
            drawn, _ = self.draw(batch["old"], batch["met"], target.shape[-1], key)
            shown = {name: torch.cat([shown[name], drawn[name]], -2) for name in shown}
        shown["noise"] = random.normal(key, "noise", 0, (shown["input"].shape[-2], self.vae.latent))
        return {"elbo": negative_elbo(self.vae.run(p["weights"], shown, ctx, "vae."), shown["input"]).mean(-1)}

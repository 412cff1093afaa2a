"""Policy and value heads: from features to the parameters of an action distribution, or to values.

A policy head's `run` returns a dictionary `d` of distribution parameters, each `[*L, ..., K]`. Its methods are pure
functions of such a dictionary, so a rollout's or a teacher's can be stored, indexed along its batch axes and compared:

    sample(d, key)          an action, differentiable where the distribution allows; the key is `[*L]`
    mode(d)                 the deterministic action
    log_prob(d, action)     `[*L, ...]`, of the action as sampled, before any clipping
    entropy(d, key)         `[*L, ...]` in nats; where there is no closed form a key asks for an unbiased estimate
    kl(d, other)            KL(d ‖ other), `[*L, ...]` in nats

Discrete actions are counted from 0. Continuous ones are in the environment's units, while the
parameters of their distribution are in the policy's (`ActionUnits`); so are densities and entropies of unbounded
Gaussians, which differ from those in the environment's units by a constant.
"""

__all__ = ["choose", "common", "deterministic", "discrete", "distributional", "gaussian", "noise", "streams", "values"]

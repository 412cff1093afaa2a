"""Neural network modules (blocks) with learner axes: layers, heads, encoders, lifting, and Fisher information."""

from rlmeta.nn.block import Block, Context, NeedsKey, Params, apply, bare, split, stack
from rlmeta.nn.checks import check_block
from rlmeta.nn.convolutional import running_convolutions, strided_convolutions
from rlmeta.nn.dropout import Dropout
from rlmeta.nn.encoder import Encoder, feature_axes
from rlmeta.nn.ensemble import Ensemble
from rlmeta.nn.fisher import FisherKind, categorical_fisher, gaussian_fisher, score_fisher
from rlmeta.nn.heads.choose import PolicyHead, head_for
from rlmeta.nn.heads.common import Distribution
from rlmeta.nn.heads.deterministic import DeterministicHead
from rlmeta.nn.heads.discrete import BernoulliHead, CategoricalHead, MultiDiscreteHead, allowed
from rlmeta.nn.heads.distributional import CategoricalQHead, QuantileQHead
from rlmeta.nn.heads.gaussian import GaussianHead, TanhGaussianHead
from rlmeta.nn.heads.noise import StateDependentNoiseHead
from rlmeta.nn.heads.streams import ActionStreams, StreamOptions
from rlmeta.nn.heads.values import QHead, ValueHead
from rlmeta.nn.initialisers import Initialiser, initialise
from rlmeta.nn.lift import Sequential, lift
from rlmeta.nn.lifted import Lifted
from rlmeta.nn.linear import Activation, ActivationName, Flatten, Linear
from rlmeta.nn.mlp import MLP
from rlmeta.nn.noisy import NoisyLinear
from rlmeta.nn.norm import BatchNorm1d, LayerNorm
from rlmeta.nn.recurrent import GRUCell, LSTMCell
from rlmeta.nn.sample_gradients import check_outputs, group_gradients, squared_gradients
from rlmeta.nn.units import ActionBounds, ActionUnits

__all__ = [
    "MLP",
    "ActionBounds",
    "ActionStreams",
    "ActionUnits",
    "Activation",
    "ActivationName",
    "BatchNorm1d",
    "BernoulliHead",
    "Block",
    "CategoricalHead",
    "CategoricalQHead",
    "Context",
    "DeterministicHead",
    "Distribution",
    "Dropout",
    "Encoder",
    "Ensemble",
    "FisherKind",
    "Flatten",
    "GRUCell",
    "GaussianHead",
    "Initialiser",
    "LSTMCell",
    "LayerNorm",
    "Lifted",
    "Linear",
    "MultiDiscreteHead",
    "NeedsKey",
    "NoisyLinear",
    "Params",
    "PolicyHead",
    "QHead",
    "QuantileQHead",
    "Sequential",
    "StateDependentNoiseHead",
    "StreamOptions",
    "TanhGaussianHead",
    "ValueHead",
    "allowed",
    "apply",
    "bare",
    "categorical_fisher",
    "check_block",
    "check_outputs",
    "feature_axes",
    "gaussian_fisher",
    "group_gradients",
    "head_for",
    "initialise",
    "lift",
    "running_convolutions",
    "score_fisher",
    "split",
    "squared_gradients",
    "stack",
    "strided_convolutions",
]

"""Neural network modules (blocks) with learner axes: layers, heads, encoders, lifting, and Fisher information."""

from rlmeta.nn.attention import (
    AttentionMemory,
    GatedTransformerLayer,
    LearnedPositions,
    MultiHeadAttention,
    Transformer,
    TransformerLayer,
    attention,
    causal_mask,
    episode_mask,
    rotate,
    sinusoidal_positions,
)
from rlmeta.nn.block import Block, Context, NeedsKey, Params, apply, bare, split, stack
from rlmeta.nn.checks import check_block
from rlmeta.nn.convolutional import running_convolutions, strided_convolutions
from rlmeta.nn.dropout import Dropout
from rlmeta.nn.embedding import Embedding
from rlmeta.nn.encoder import Choose, Encoder, feature_axes
from rlmeta.nn.ensemble import Ensemble
from rlmeta.nn.fisher import FisherKind, categorical_fisher, gaussian_fisher, score_fisher
from rlmeta.nn.heads.choose import PolicyHead, head_for
from rlmeta.nn.heads.common import Distribution
from rlmeta.nn.heads.deterministic import DeterministicHead
from rlmeta.nn.heads.discrete import BernoulliHead, CategoricalHead, MultiDiscreteHead, allowed
from rlmeta.nn.heads.distributional import CategoricalQHead, QuantileQHead
from rlmeta.nn.heads.gaussian import GaussianHead, TanhGaussianHead
from rlmeta.nn.heads.noise import StateDependentNoiseHead, TanhStateDependentNoiseHead
from rlmeta.nn.heads.streams import ActionStreams, StreamOptions
from rlmeta.nn.heads.values import QHead, ValueHead
from rlmeta.nn.initialisers import Initialiser, initialise
from rlmeta.nn.lift import Sequential, lift
from rlmeta.nn.lifted import Lifted
from rlmeta.nn.linear import Activation, ActivationName, Flatten, Linear
from rlmeta.nn.mlp import MLP
from rlmeta.nn.noisy import NoisyLinear
from rlmeta.nn.norm import BatchNorm1d, LayerNorm
from rlmeta.nn.pictures import Layout, Picture, impala_cnn, minatar_cnn, nature_cnn, picture_cnn, picture_layout
from rlmeta.nn.recurrent import ElmanCell, GRUCell, LSTMCell, Recurrent
from rlmeta.nn.renorm import BatchRenorm
from rlmeta.nn.sample_gradients import absolute_gradients, check_outputs, group_gradients, squared_gradients
from rlmeta.nn.units import ActionBounds, ActionUnits
from rlmeta.nn.weight_norm import NormedWeight

__all__ = [
    "MLP",
    "ActionBounds",
    "ActionStreams",
    "ActionUnits",
    "Activation",
    "ActivationName",
    "AttentionMemory",
    "BatchNorm1d",
    "BatchRenorm",
    "BernoulliHead",
    "Block",
    "CategoricalHead",
    "CategoricalQHead",
    "Choose",
    "Context",
    "DeterministicHead",
    "Distribution",
    "Dropout",
    "ElmanCell",
    "Embedding",
    "Encoder",
    "Ensemble",
    "FisherKind",
    "Flatten",
    "GRUCell",
    "GatedTransformerLayer",
    "GaussianHead",
    "Initialiser",
    "LSTMCell",
    "LayerNorm",
    "Layout",
    "LearnedPositions",
    "Lifted",
    "Linear",
    "MultiDiscreteHead",
    "MultiHeadAttention",
    "NeedsKey",
    "NoisyLinear",
    "NormedWeight",
    "Params",
    "Picture",
    "PolicyHead",
    "QHead",
    "QuantileQHead",
    "Recurrent",
    "Sequential",
    "StateDependentNoiseHead",
    "StreamOptions",
    "TanhGaussianHead",
    "TanhStateDependentNoiseHead",
    "Transformer",
    "TransformerLayer",
    "ValueHead",
    "absolute_gradients",
    "allowed",
    "apply",
    "attention",
    "bare",
    "categorical_fisher",
    "causal_mask",
    "check_block",
    "check_outputs",
    "episode_mask",
    "feature_axes",
    "gaussian_fisher",
    "group_gradients",
    "head_for",
    "impala_cnn",
    "initialise",
    "lift",
    "minatar_cnn",
    "nature_cnn",
    "picture_cnn",
    "picture_layout",
    "rotate",
    "running_convolutions",
    "score_fisher",
    "sinusoidal_positions",
    "split",
    "squared_gradients",
    "stack",
    "strided_convolutions",
]

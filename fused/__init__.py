"""Fused optimizers for PyTorch: drop-in ``torch.optim`` classes that step the whole model at once."""

from importlib.metadata import PackageNotFoundError, version

from .accumulate import GradientAccumulator
from .adadelta import Adadelta
from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .checkpoint import load_master_state_dict, master_state_dict
from .clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .from_torch import from_torch
from .groups import param_groups
from .lion import Lion
from .optimizer import FusedOptimizer
from .rmsprop import RMSprop
from .scaler import GradScaler
from .sgd import SGD
from .warmup import warmup

try:
    __version__ = version("fused-optim")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "FusedOptimizer",
    "GradScaler",
    "GradientAccumulator",
    "Lion",
    "RMSprop",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "from_torch",
    "get_total_norm",
    "load_master_state_dict",
    "master_state_dict",
    "param_groups",
    "warmup",
]

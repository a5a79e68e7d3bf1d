"""What the checks of PyTorch answers share: modules' names, and bfloat16."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from grader.compare import WrongForm
from torch import Tensor, nn


def refuse_other_names(module: object, weights: Mapping[str, Tensor]) -> None:
    """Raise WrongForm unless a module's state dict has these weights and no others."""
    if not isinstance(module, nn.Module):
        raise WrongForm("Your class is no nn.Module: `class ...(nn.Module):`.")
    found = module.state_dict()
    said = [f"{n} is missing" for n in weights if n not in found]
    said += [f"{n} is not DeepSeek's" for n in found if n not in weights]
    if said:
        raise WrongForm("Names in the state dict: " + "; ".join(said) + ".")
    for name, weight in weights.items():
        shape, wanted = tuple(found[name].shape), tuple(weight.shape)
        if shape != wanted:
            raise WrongForm(f"{name} has shape {shape}, DeepSeek's has {wanted}.")
    parameters = dict(module.named_parameters())
    for name in weights:
        if name not in parameters:
            raise WrongForm(f"{name} is no nn.Parameter: no optimiser would see it.")


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest numbers that bfloat16 has, in the dtype of x."""
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)

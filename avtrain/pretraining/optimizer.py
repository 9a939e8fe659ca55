"""Pretraining's optimiser, and which parameters decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from avtrain.config import TrainingConfig

_TOKEN_VECTORS = {"bos", "modality", "positions", "mask"}


def pretraining_optimizer(modules: dict[str, nn.Module], config: TrainingConfig,
                          fused: bool = True) -> torch.optim.AdamW:
    """AdamW with AMSGrad of all parameters of these modules, in one kernel."""
    return torch.optim.AdamW(parameter_groups(modules, config.weight_decay), lr=config.learning_rate,
                             betas=(0.9, 0.98), amsgrad=True, fused=fused)


def parameter_groups(modules: dict[str, nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """All parameters once, in two groups: with weight decay (matrices, kernels) and without.

    Without: norms and biases, known by their one dimension; and vectors that are tokens or are added to tokens, stacked
    in matrices and known by the last part of their name: bos, modality, positions, mask.
    """
    named = {id(parameter): (name.rpartition(".")[2], parameter) for module in modules.values()
             for name, parameter in module.named_parameters() if parameter.requires_grad}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named.values():
        groups[parameter.dim() > 1 and name not in _TOKEN_VECTORS].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]

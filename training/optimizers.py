"""Optimizers: Muon for the matrices and AdamW for the rest, as one torch optimizer, and the learning-rate shape over
a run.

Pure torch; knows nothing of models but the shapes and names of their parameters.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration that pushes all singular values towards 1. Source: Keller Jordan, Muon (2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on 2-D matrices inside the blocks, AdamW on embeddings, norms and biases.

    torch's own Muon orthogonalises in bfloat16 and one matrix at a time, which a CPU without bfloat16 units does
    three times slower than this float32 form that stacks equal shapes.

    Args:
        named_parameters: (name, parameter) pairs; those that need no gradient are left out.
        lr: learning rate of Muon.
        adam_lr: learning rate of AdamW.
        momentum: of Muon (Nesterov).
        betas: of AdamW.
        weight_decay: decoupled, for both.
        iterations: Newton-Schulz iterations.
    """

    def __init__(
        self,
        named_parameters: Any,
        lr: float = 0.02,
        adam_lr: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        iterations: int = 5,
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (matrices if is_matrix else others).append(parameter)
        groups = [
            {"params": matrices, "lr": lr, "kind": "muon", "momentum": momentum, "iterations": iterations},
            {"params": others, "lr": adam_lr, "kind": "adamw", "betas": betas},
        ]
        super().__init__([group for group in groups if group["params"]], {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["weight_decay"]:
                for parameter in parameters:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["kind"] == "muon":
                self._muon(group, parameters)
            else:
                self._adamw(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for shape, members in by_shape.items():
            updates = []
            for parameter in members:
                gradient = _gradient(parameter)
                buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(gradient, 1 - group["momentum"])
                updates.append(gradient.lerp(buffer, group["momentum"]))
            steps = orthogonalise(torch.stack(updates), group["iterations"])
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(members, steps, strict=True):
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        first, second = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] += 1
            count = float(state["step"])
            gradient = _gradient(parameter)
            state["mean"].lerp_(gradient, 1 - first)
            state["square"].lerp_(gradient.square(), 1 - second)
            spread = (state["square"] / (1 - second**count)).sqrt_().add_(1e-8)
            parameter.addcdiv_(state["mean"], spread, value=-group["lr"] / (1 - first**count))


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # `step` passes only parameters that have one
    return parameter.grad


def orthogonalise(updates: Tensor, iterations: int = 5) -> Tensor:
    """Move the singular values of each matrix near 1 by Newton-Schulz iterations.

    Args:
        updates: [matrices, rows, columns].
        iterations: how many.

    Returns:
        float32 tensor of the same shape.
    """
    a, b, c = _NEWTON_SCHULZ
    x = updates.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # [matrices, short side, short side]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def trapezoid(progress: float, warmup: float, hold: float) -> float:
    """Learning-rate factor at a point of the run: up linearly, level, down linearly to zero.

    Args:
        progress: done part of the run in [0, 1].
        warmup: part of the run after which the factor is 1.
        hold: part of the run after which the factor falls.

    Returns:
        Factor in [0, 1].
    """
    if progress < warmup:
        return progress / warmup
    return min(1.0, max(0.0, (1 - progress) / max(1 - hold, 1e-9)))


def cosine(progress: float, warmup: float) -> float:
    """Learning-rate factor at a point of the run: up linearly, down as half a cosine to zero.

    Args:
        progress: done part of the run in [0, 1].
        warmup: part of the run after which the factor is 1.

    Returns:
        Factor in [0, 1].
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1 - warmup, 1e-9))))

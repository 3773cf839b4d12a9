"""Muon with AdamW for what is no matrix: fewer steps to the same loss than AdamW alone.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the scale of the update is that of Liu et
al. 2025, "Muon is scalable for LLM training", so that one learning rate suits both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonal(matrices: Tensor) -> Tensor:
    """Return (n, rows, columns) matrices with their singular values brought near one, by Newton-Schulz iterations."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the weights of linear layers and convolutions.

    Args:
        parameters: of two or more dimensions; what follows the first is one.
        lr: step size.
        momentum: share of the running sum of gradients that is kept.
        weight_decay: times the learning rate, taken off the weights.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for (rows, columns), parameters in alike.items():
                updates = []
                for parameter in parameters:
                    sums = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    sums.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(sums, group["momentum"]).flatten(1))
                scale = 0.2 * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, orthogonal(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * scale)


class Optimizers:
    """Muon for the matrices of a model and AdamW for its vectors, embeddings and `others`, as one.

    Args:
        model: what is trained; parameters without gradient are left out.
        lr: of Muon.
        adam_lr: of AdamW.
        others: parts of the model, by the beginning of their names, that AdamW trains too: where numbers come in and
            go out.
    """

    def __init__(self, model: nn.Module, lr: float, adam_lr: float, others: tuple[str, ...], decay: float) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim > 1 and id(parameter) not in tables and not name.startswith(others)
                (matrices if matrix else rest).append(parameter)
        self.both = (
            Muon(matrices, lr, weight_decay=decay),
            torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=decay),
        )
        self.rates = (lr, adam_lr)

    def step(self, share: float) -> None:
        """Take a step with `share` of the learning rates, and forget the gradients."""
        for optimizer, rate in zip(self.both, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * rate
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.both]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.both, states, strict=True):
            optimizer.load_state_dict(state)

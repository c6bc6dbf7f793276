"""The fusion functions phi: how a bottleneck combines source and target states (FLARE, arXiv 2501.06892, section 3).

Shapes: S [B, S, r] source states, T [B, T, r] target states, both already down-projected by the shared LoRA A; the
result is [B, T, r]. Where the source has no token, phi is a function of the target alone: padding is never fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """phi(S, T). `aligned` says that position t of the source must belong to position t of the target (S == T)."""

    aligned = True

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        """
        Args:
            source: [B, S, r], `target`: [B, T, r], `source_mask`: [B, S] bool, True where there is a token.

        Returns:
            [B, T, r].

        Raises:
            ValueError: the shapes do not fit; element-wise functions need S == T (see `flare_exp.flare.source_states.align`).
        """
        if source.shape[::2] != target.shape[::2] or source_mask.shape != source.shape[:2]:
            shapes = f"source {list(source.shape)}, target {list(target.shape)}, source_mask {list(source_mask.shape)}"
            raise ValueError(
                f"batch sizes and ranks must agree and the mask must be [B, S]: {shapes}"
            )
        if self.aligned and source.shape[1] != target.shape[1]:
            raise ValueError(
                f"{type(self).__name__} fuses position by position: S={source.shape[1]} but T={target.shape[1]}"
            )
        return self.fuse(source, target, source_mask)

    def fuse(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        raise NotImplementedError  # pragma: no cover


class ElementWise(Fusion):
    """`combine(f(S), f(T))`, and f(T) where there is no source token. No parameters."""

    def __init__(
        self,
        combine: Callable[[Tensor, Tensor], Tensor],
        f: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.combine, self.f = combine, f

    def fuse(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        if self.f is not None:
            source, target = self.f(source), self.f(target)
        return torch.where(source_mask[..., None], self.combine(source, target), target)


class Gated(Fusion):
    """g*S + (1-g)*T with g = sigmoid(W [S; T] + b) per channel; ours, not the paper's. 2r^2 + r parameters.

    Starts at W = 0, b = -4, so close to plain LoRA.
    """

    def __init__(self, rank: int, bias: float = -4.0):
        super().__init__()
        self.gate = nn.Linear(2 * rank, rank)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, bias)

    def fuse(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(torch.cat([source, target], dim=-1)))
        return torch.where(source_mask[..., None], gate * source + (1 - gate) * target, target)


class CrossAttention(Fusion):
    """softmax(Q K^T / sqrt(r/heads)) V with r -> r projections; 3(r^2 + r) parameters.

    By default the target asks and the source answers, source padding masked; a row without any source token gives T.
    `query="source"` is the direction of the paper's released code: the source asks, the target answers, still masked so
    that source padding gives T (needs S == T).
    """

    def __init__(self, rank: int, heads: int = 1, query: str = "target"):
        super().__init__()
        if rank % heads:
            raise ValueError(f"heads={heads} must divide the rank {rank}")
        if query not in ("target", "source"):
            raise ValueError(f"query={query!r} is neither 'target' nor 'source'")
        self.heads, self.query_from, self.aligned = heads, query, query == "source"
        self.query, self.key, self.value = (nn.Linear(rank, rank) for _ in range(3))

    def fuse(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        if self.query_from == "source":
            # Which target positions are padding is not known here, as in the released code.
            return torch.where(source_mask[..., None], self.attend(source, target, None), target)
        some = source_mask.any(dim=1)[:, None, None]
        # A row without source would be a softmax over nothing; it attends freely and is then replaced.
        return torch.where(
            some, self.attend(target, source, source_mask[:, None, None] | ~some[:, None]), target
        )

    def attend(self, asking: Tensor, answering: Tensor, mask: Tensor | None) -> Tensor:
        """asking [B, Q, r], answering [B, K, r], mask [B, 1, 1, K] -> [B, Q, r]."""
        query, key, value = (
            projection(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, states in (
                (self.query, asking),
                (self.key, answering),
                (self.value, answering),
            )
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


FUSIONS: dict[str, Callable[..., Fusion]] = {
    "add": lambda rank: ElementWise(torch.add),
    "mul": lambda rank: ElementWise(torch.mul),
    "add_relu": lambda rank: ElementWise(torch.add, torch.relu),
    "mul_relu": lambda rank: ElementWise(torch.mul, torch.relu),
    "cross_attn": CrossAttention,
    "gated": Gated,
}


def build(name: str, rank: int, **options) -> Fusion:
    """The fusion function called `name` for bottlenecks of `rank` channels.

    Options: cross_attn takes `heads` (1) and `query` ("target" | "source"); gated takes `bias` (-4.0).

    Raises:
        ValueError: an unknown name or option, or one that does not fit the rank.
    """
    if name not in FUSIONS:
        raise ValueError(f"unknown fusion {name!r}; there are {', '.join(FUSIONS)}")
    try:
        return FUSIONS[name](rank, **options)
    except TypeError as error:
        raise ValueError(f"fusion {name} does not take these options: {options}") from error

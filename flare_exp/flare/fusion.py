"""Define the fusion functions phi, which combine source and target states in the bottleneck.

See FLARE, arXiv 2501.06892, section 3. Shapes: S [B, S, r] source states, T [B, T, r] target
states, both already projected down by the shared LoRA A; the result is [B, T, r]. Where the source
has no token, phi is a function of the target alone: padding is never fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """Base class of the fusion functions phi(S, T).

    `aligned` is True if position t of the source must belong to position t of the target, so S ==
    T.
    """

    aligned = True

    def forward(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        """Check the shapes and fuse the source states into the target states.

        Args:
            source: [B, S, r].
            target: [B, T, r].
            source_mask: [B, S] bool, True where there is a token.

        Returns:
            [B, T, r].

        Raises:
            ValueError: the shapes do not fit; element-wise functions need S == T (see
                `flare_exp.flare.source_states.align`).
        """
        if source.shape[::2] != target.shape[::2] or source_mask.shape != source.shape[:2]:
            shapes = (
                f"source {list(source.shape)}, target {list(target.shape)}, "
                f"source_mask {list(source_mask.shape)}"
            )
            raise ValueError(
                f"batch sizes and ranks must agree and the mask must be [B, S]: {shapes}"
            )
        if self.aligned and source.shape[1] != target.shape[1]:
            raise ValueError(
                f"{type(self).__name__} fuses position by position: S={source.shape[1]} but "
                f"T={target.shape[1]}"
            )
        return self.fuse(source, target, source_mask)

    def fuse(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        """Compute phi(S, T) for shapes that `forward` has checked: [B, T, r]."""
        raise NotImplementedError  # pragma: no cover


class ElementWise(Fusion):
    """Element-wise fusion: `combine(f(S), f(T))`, and f(T) where there is no source token.

    It has no parameters.
    """

    def __init__(
        self,
        combine: Callable[[Tensor, Tensor], Tensor],
        f: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.combine, self.f = combine, f

    def fuse(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        """Combine the states position by position."""
        if self.f is not None:
            source, target = self.f(source), self.f(target)
        return torch.where(source_mask[..., None], self.combine(source, target), target)


class Gated(Fusion):
    """Gated fusion: `g * S + (1 - g) * T` with `g = sigmoid(W [S; T] + b)` per channel.

    This function is not in the paper. It has 2r^2 + r parameters and starts at W = 0, b = -4, close
    to plain LoRA.
    """

    def __init__(self, rank: int, bias: float = -4.0):
        super().__init__()
        self.gate = nn.Linear(2 * rank, rank)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, bias)

    def fuse(self, source: Tensor, target: Tensor, source_mask: Tensor) -> Tensor:
        """Mix the states with one gate per position and channel."""
        gate = torch.sigmoid(self.gate(torch.cat([source, target], dim=-1)))
        return torch.where(source_mask[..., None], gate * source + (1 - gate) * target, target)


class CrossAttention(Fusion):
    """Cross-attention: softmax(Q K^T / sqrt(r/heads)) V with r -> r projections.

    It has 3(r^2 + r) parameters. By default the queries are target states, and keys and values are
    source states with padding masked. A row without any source token gives T. `query="source"` is
    the direction of the paper's released code: the queries are source states, keys and values are
    target states, and source padding still gives T. It needs S == T.
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
        """Attend from one sequence to the other; return T where there is no source."""
        if self.query_from == "source":
            # Target padding is not masked: no target mask is passed in, as in the released code.
            return torch.where(source_mask[..., None], self.attend(source, target, None), target)
        some = source_mask.any(dim=1)[:, None, None]
        # The softmax of a row without source would be NaN: it attends everywhere and is replaced.
        return torch.where(
            some, self.attend(target, source, source_mask[:, None, None] | ~some[:, None]), target
        )

    def attend(self, asking: Tensor, answering: Tensor, mask: Tensor | None) -> Tensor:
        """Compute multi-head attention from `asking` to `answering`.

        Args:
            asking: [B, Q, r] states that give the queries.
            answering: [B, K, r] states that give keys and values.
            mask: [B, 1, 1, K] bool, True where attention is allowed; None allows every position.

        Returns:
            [B, Q, r].
        """
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


def combine_sources(
    sources: Tensor, masks: Tensor, target: Tensor, how: str
) -> tuple[Tensor, Tensor]:
    """Combine several sources of one text into one, position by position.

    This is not in the paper. K sources; only those with a token at a position count there.

        mean: S = (1/K) sum_k S_k        attention: S = sum_k a_k S_k,
        a = softmax over k of T . S_k / sqrt(r)

    Args:
        sources: [K, B, T, r], aligned with the target.
        masks: [K, B, T] bool, True where there is a token.
        target: [B, T, r].
        how: "attention" or "mean".

    Returns:
        the source [B, T, r], and its mask [B, T].
    """
    scores = (sources * target).sum(-1) / math.sqrt(target.shape[-1])
    if how == "mean":
        scores = torch.zeros_like(scores)
    some = masks.any(0)
    # without any source the softmax would be NaN: all count there, and the mask says so
    weights = scores.masked_fill(~masks & some, float("-inf")).softmax(0)
    return (weights[..., None] * sources).sum(0), some


FUSIONS: dict[str, Callable[..., Fusion]] = {
    "add": lambda rank: ElementWise(torch.add),
    "mul": lambda rank: ElementWise(torch.mul),
    "add_relu": lambda rank: ElementWise(torch.add, torch.relu),
    "mul_relu": lambda rank: ElementWise(torch.mul, torch.relu),
    "cross_attn": CrossAttention,
    "gated": Gated,
}


def build(name: str, rank: int, **options) -> Fusion:
    """Build the fusion function called `name` for bottlenecks of `rank` channels.

    Options: cross_attn takes `heads` (1) and `query` ("target" | "source"); gated takes `bias`
    (-4.0).

    Raises:
        ValueError: an unknown name or option, or one that does not fit the rank.
    """
    if name not in FUSIONS:
        raise ValueError(f"unknown fusion {name!r}; there are {', '.join(FUSIONS)}")
    try:
        return FUSIONS[name](rank, **options)
    except TypeError as error:
        raise ValueError(f"fusion {name} does not take these options: {options}") from error

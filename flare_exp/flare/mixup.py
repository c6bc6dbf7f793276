"""Mix source states into the target's at chosen blocks: X-Mixup (arXiv 2205.04182, ICLR 2022).

Source and target are read by the same model up to a block. There, the target's states become a
mixture of themselves and of what they attend to in the source. B rows, T target tokens, S source
tokens, d channels:

    q = N(h^T) + U_q D_q N(h^T),  k = N(h^S) + U_k D_k N(h^S)       [B, T, d], [B, S, d]
    A = q k^T / sqrt(d)                                             [B, T, S]
    P = softmax over the source of A,  R = softmax over the target of A^T
    H = mean over target tokens of entropy(P) + mean over source tokens of entropy(R)      [B]
    lambda = lambda_0 sigmoid(w H + b)                                                     [B]
    h = (1 - lambda) h^T + lambda P h^S                             [B, T, d]

N is layer normalization without weights. U_q, U_k and b start at 0, w at 1; lambda_0 = 0.5. The
loss on the target gets two more terms: `kl_consistency` (labels only) and `state_consistency`.

The equation of lambda, the losses, their constants and the blocks (`DEPTHS`) are those of the
authors' code (github.com/yhy1117/X-Mixup). Simplified here, so that the method is an adapter for
every family:

- LoRA, this module and the head are trained, not the whole model.
- The frozen English model reads the source, without gradient and dropout. So the loss on the
  source's labels is left out, to which they give a share of 0.4 (labels) or 0.2 (spans): that model
  has been trained on it before. By a schedule they replace the source by its back-translation; here
  it is always the text of the pair.
- They attend with the block's own heads, between its attention and its feed-forward layer. Here
  a block's output is mixed, by one head with low-rank maps of its own, and the values are the
  source's states themselves: the mixture is one of states of the same kind.
- Their entropy counts padding (as a logit of 0). Here padding has no influence.
- A decoder mixes the prompt alone: lambda depends on all tokens, so it would see the answer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flare_exp.flare.source_states import BlockKey, SourceStates

NAME = "x_mixup"  # stands for a fusion in a `FlareConfig`

# task type -> the block that mixes, as a share of the depth: of XLM-R large's 24 blocks the authors
# mix in the first for labels and in the 16th for spans. They prompt no model.
DEPTHS = {"label": 0.0, "span": 15 / 24, "prompt": 15 / 24}


def block_at(depth: float, blocks: int) -> int:
    """Return the number of the block at a share of the depth, from 0 to blocks - 1.

    Raises:
        ValueError: the share is not in 0..1.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} is not in 0..1")
    return min(int(depth * blocks + 0.5), blocks - 1)


class Mixing(nn.Module):
    """Mix source states into target states; see the equations of this module.

    It has 4 r d + 2 parameters.

    Args:
        width: channels d of the states.
        rank: channels r of the learned maps.
        most: lambda_0, the upper limit of the source's share.
    """

    def __init__(self, width: int, rank: int, most: float = 0.5):
        super().__init__()
        if not 0 < most <= 1:
            raise ValueError(f"most={most} is not above 0 and at most 1")
        self.most = most
        self.query, self.key = LowRank(width, rank), LowRank(width, rank)
        self.ratio = nn.Linear(1, 1)
        nn.init.ones_(self.ratio.weight)
        nn.init.zeros_(self.ratio.bias)

    def forward(
        self, target: Tensor, source: Tensor, target_mask: Tensor, source_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the mixture.

        Args:
            target: h^T [B, T, d].
            source: h^S [B, S, d].
            target_mask: [B, T] bool, True at the tokens that are mixed.
            source_mask: [B, S] bool, True at tokens.

        Returns:
            states [B, T, d], which are `target` where the mask is False and in rows without any
            token of the source; and lambda [B], 0 in such rows.

        Raises:
            ValueError: the shapes do not fit.
        """
        if target.shape[::2] != source.shape[::2] or (
            (target_mask.shape, source_mask.shape) != (target.shape[:2], source.shape[:2])
        ):
            shapes = ", ".join(
                str(list(x.shape)) for x in (target, source, target_mask, source_mask)
            )
            raise ValueError(f"[B, T, d], [B, S, d], [B, T] and [B, S] are needed, not {shapes}")
        rows = source_mask.any(1) & target_mask.any(1)
        scores = self.query(target) @ self.key(source).transpose(1, 2) / math.sqrt(target.shape[-1])
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # a softmax over nothing would be NaN; such rows are replaced at the end
        readable, asking = (mask | ~rows[:, None] for mask in (source_mask, target_mask))
        attention, to_source = attend(scores, asking, readable)
        _, to_target = attend(scores.transpose(1, 2), readable, asking)
        share = self.most * torch.sigmoid(self.ratio((to_source + to_target)[:, None]))  # [B, 1]
        share = torch.where(rows[:, None], share, torch.zeros_like(share))
        mixed = (1 - share[..., None]) * target + share[..., None] * (
            attention.to(source.dtype) @ source
        )
        chosen = (target_mask & rows[:, None])[..., None]
        return torch.where(chosen, mixed.to(target.dtype), target), share[:, 0]


class LowRank(nn.Module):
    """Normalize states, and add a low-rank map of them that starts at zero."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        """Map states [..., d] to [..., d], in the precision of the weights."""
        states = states.to(self.down.weight.dtype)
        normal = nn.functional.layer_norm(states, states.shape[-1:])
        return normal + self.up(self.down(normal))


def attend(scores: Tensor, asking: Tensor, readable: Tensor) -> tuple[Tensor, Tensor]:
    """Compute attention and its mean entropy in nats.

    Args:
        scores: [B, Q, K].
        asking: [B, Q] bool, the queries that count in the mean; one of each row at least.
        readable: [B, K] bool, the keys that are attended to; one of each row at least.

    Returns:
        attention [B, Q, K] and entropy [B].
    """
    logs = scores.masked_fill(~readable[:, None], float("-inf")).log_softmax(-1)
    attention = logs.exp()
    # 0 log 0 = 0, and its gradient would be NaN
    entropy = -(attention * logs.masked_fill(~readable[:, None], 0)).sum(-1)
    return attention, (entropy * asking).sum(1) / asking.sum(1)


# --- losses ---------------------------------------------------------------------------------------


def kl_consistency(source: Tensor, target: Tensor) -> Tensor:
    """Compute KL(p^S || p^T) of each row, the classes' distributions of source and target.

    Args:
        source: logits [B, classes] of the source. They get no gradient here.
        target: logits [B, classes] of the mixed target.

    Returns:
        [B], in nats.
    """
    wanted, found = source.detach().log_softmax(-1), target.log_softmax(-1)
    return nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def state_consistency(
    source: Tensor, target: Tensor, source_mask: Tensor, target_mask: Tensor, pool: str = "mean"
) -> Tensor:
    """Compute the mean squared difference of each row's final states of source and target.

    Args:
        source: [B, S, d]. They get no gradient here.
        target: [B, T, d].
        source_mask: [B, S] bool.
        target_mask: [B, T] bool.
        pool: "first" compares the states of the first tokens (labels), "mean" the mean states of
            all tokens (spans).

    Returns:
        [B]; 0 in rows where one of the two has no token.

    Raises:
        ValueError: an unknown `pool`.
    """
    rows = source_mask.any(1) & target_mask.any(1)
    one, other = pooled(source.detach(), source_mask, pool), pooled(target, target_mask, pool)
    return (one - other).square().mean(-1) * rows


def pooled(states: Tensor, mask: Tensor, pool: str) -> Tensor:
    """Reduce states [B, L, d] with mask [B, L] to one state for each row, [B, d].

    Raises:
        ValueError: an unknown `pool`.
    """
    if pool == "first":
        first = mask.long().argmax(1)
        return states[torch.arange(len(states), device=states.device), first]
    if pool != "mean":
        raise ValueError(f"pool={pool!r} is neither 'first' nor 'mean'")
    kept = states.masked_fill(~mask[..., None], 0)
    return kept.sum(1) / mask.sum(1).clamp(min=1)[:, None]


# --- in a model -----------------------------------------------------------------------------------


class MixupStates(SourceStates):
    """The source states that the mixing blocks read, and what the losses need of the target pass.

    Attributes:
        target: final states [B, T, d] of the last target pass.
        target_mask: [B, T] bool, its tokens.
        logits: logits [B, classes] of the source; None if only states were read.
        shares: block -> lambda [B] of that pass, without gradient.
    """

    def clear(self, prompt: int | None = None, count: int = 1) -> None:
        """Drop the source and the target pass."""
        super().clear(prompt, count)
        self.target: Tensor | None = None
        self.target_mask: Tensor | None = None
        self.logits: Tensor | None = None
        self.shares: dict[BlockKey, Tensor] = {}

    def begin_recording(self) -> None:
        """Begin a source pass."""
        super().begin_recording()
        self.outputs: dict[BlockKey, Tensor] = {}

    def source(self) -> tuple[Tensor, Tensor] | None:
        """Return the source's final states [B, S, d] and mask [B, S]; None without a source."""
        return self.states_for(self.blocks[-1])

    def mixed_tokens(self, states: Tensor) -> Tensor | None:
        """Return which tokens of the present pass [B, T, d] are mixed: [B, T] bool.

        None: it is a later piece of a decoder's pass, behind the prompt.
        """
        if self.padding_side == "left" and self._start >= self._prompt:
            return None
        batch, length = states.shape[:2]
        mask = self.target_mask
        known = mask is not None and mask.shape == (batch, length)
        tokens = mask if known else states.new_ones(batch, length, dtype=torch.bool)
        assert tokens is not None
        if self.padding_side == "left":
            tokens = tokens & (self._positions(length, states.device) < self._prompt)
        return tokens


def mix(
    states: MixupStates,
    key: BlockKey,
    layer: Any,
    attribute: str,
    adapter: str,
    _: nn.Module,
    args: tuple,
    output: Any,
) -> Any:
    """Mix the source into the output of a block; a forward hook.

    The source pass, and a pass without this adapter, leave the output as it is.
    """
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    if states.recording:
        states.outputs.setdefault(key, hidden)
        return None
    if layer.disable_adapters or adapter not in layer.active_adapters:
        return None
    batch = len(hidden)
    states.use(batch)
    found = states.states_for(key)
    tokens = states.mixed_tokens(hidden)
    if found is None or tokens is None:
        return None
    # in some families the state after the last block is normalized: `found` has that one
    source, mask = states.outputs[key], found[1]
    if batch != len(mask):  # candidate answers: successive rows of one source
        source, mask = (x.repeat_interleave(batch // len(mask), dim=0) for x in (source, mask))
    mixed, share = getattr(layer, attribute)[adapter](hidden, source.to(hidden.dtype), tokens, mask)
    states.shares[key] = share.detach()
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def watch(states: MixupStates, whole: nn.Module, stacks: Sequence[nn.Module]) -> None:
    """Keep the mask and the final states of each target pass.

    Args:
        states: where they are kept.
        whole: the model with its head, which gets the mask [B, T].
        stacks: the modules that run a stack of blocks, in their order.
    """
    for module in (whole, stacks[0]):
        module.register_forward_pre_hook(functools.partial(_mask, states), with_kwargs=True)
    stacks[-1].register_forward_hook(functools.partial(_final, states))


def _mask(states: MixupStates, _: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    # within a model the mask may have another form: [B, 1, T, T]
    if not states.recording and isinstance(mask, Tensor) and mask.dim() == 2:
        states.target_mask = mask.bool()


def _final(states: MixupStates, _: nn.Module, args: tuple, output: Any) -> None:
    if not states.recording:
        states.target = output[0]

"""Keep NaN and infinite numbers out of every file of weights and every loaded model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flare_exp.errors import UserError


def check_finite(weights: Iterable[tuple[str, Tensor]], place: str) -> None:
    """Check that weights hold neither NaN nor infinite numbers; packed 4-bit weights are skipped.

    Args:
        weights: names and tensors.
        place: where the weights are, for the message.

    Raises:
        UserError: some weights are not finite; the message names them.
    """
    bad = [name for name, tensor in weights if not _finite(tensor.detach())]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise UserError(
            f"{place}: {len(bad)} weights hold NaN or infinite numbers ({shown}); they cannot be "
            "used"
        )


def _finite(tensor: Tensor) -> bool:
    """Return whether a tensor is finite; a tensor without values or of integers is."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    # aminmax makes no copy of the tensor, unlike isfinite, and propagates NaN
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())

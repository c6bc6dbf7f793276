"""Keep NaN and infinite numbers out of every file of weights, and of every model that is loaded."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flare_exp.errors import UserError


def check_finite(weights: Iterable[tuple[str, Tensor]], place: str) -> None:
    """Check that weights hold neither NaN nor infinite numbers; packed 4-bit weights are not looked at.

    Raises:
        UserError: some do; names them.
    """
    bad = [name for name, tensor in weights if not _finite(tensor.detach())]
    if bad:
        shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        raise UserError(
            f"{place}: {len(bad)} weights hold NaN or infinite numbers ({shown}); they cannot be "
            "used"
        )


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    # one pass and no copy, where isfinite makes one; both propagate NaN
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())

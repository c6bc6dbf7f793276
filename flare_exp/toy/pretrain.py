"""Pre-train the tiny multilingual models on the generated world's text.

Target languages are under-represented on purpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flare_exp.toy.architectures import ARCHITECTURES
from flare_exp.toy.tokenizers import MAX_LENGTH
from flare_exp.toy.training import STATE, reproducible, save, train
from flare_exp.toy.world import World
from flare_exp.utils import signals


def pretrain(
    folder: Path,
    *,
    architecture: str,
    world_seed: int,
    documents: int,
    steps: int,
    batch_size: int,
    lr: float,
    vocab_size: int,
    hidden_size: int,
    layers: int,
    heads: int,
    target_share: float,
    recall: float = 0.0,
    half_share: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a tiny model and save it, with its tokenizer, as an ordinary checkpoint in `folder`.

    Returns:
        facts for the manifest: parameter count, vocabulary size, loss over the last 100 steps.
    """
    import torch

    kind = ARCHITECTURES[architecture]
    with reproducible():
        texts = World(world_seed).corpus(documents, target_share, recall, half_share)
        signals.raise_if_signalled("before pre-training")
        tokenizer = kind.tokenizer(texts, vocab_size)
        signals.raise_if_signalled("before pre-training")
        torch.manual_seed(seed)
        model = kind.blank(tokenizer, hidden_size, layers, heads)
        rows = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        signals.raise_if_signalled("before pre-training")
        losses = train(
            model, rows, kind.collate(tokenizer), steps, batch_size, lr, state=folder / STATE
        )
    # dropout is for fine-tuning; in pre-training, one pass over little text, it slows learning
    for name in kind.dropout:
        setattr(model.config, name, 0.1)
    return save(folder, model, tokenizer, kind.objective, losses)

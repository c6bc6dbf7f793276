"""Pre-trains the tiny multilingual model on the generated world's text: real XLM-R classes, masked language modelling,
target languages under-represented on purpose."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flare_exp.tiny.world import World

if TYPE_CHECKING:
    from transformers import XLMRobertaForMaskedLM, XLMRobertaTokenizer

MAX_LENGTH = 128  # tokens

log = logging.getLogger(__name__)


def train_tokenizer(documents: list[str], vocab_size: int, max_length: int) -> XLMRobertaTokenizer:
    """An XLMRobertaTokenizer with pieces learned from `documents`: whole words for English, fragments for the rest.

    The pieces come from byte-pair merges, scored by their rank: the unigram learner prunes frequent words of a corpus
    as small as this one.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import XLMRobertaTokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    learner.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    pieces = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    vocab = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab += [(token, -math.log(rank + 10)) for token, rank in pieces] + [("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab, model_max_length=max_length)


def pretrain(
    folder: Path,
    *,
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
    seed: int = 0,
) -> dict[str, Any]:
    """Train a tiny XLM-R and save it, with its tokenizer, as an ordinary checkpoint in `folder`.

    Returns facts for the manifest: parameter count, masked-token loss over the last 100 steps.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as fast at this size, and the same sums on every machine
    try:
        with torch.random.fork_rng(devices=[]):
            texts = World(world_seed).corpus(documents, target_share)
            tokenizer = train_tokenizer(texts, vocab_size, MAX_LENGTH)
            torch.manual_seed(seed)
            model = blank_model(tokenizer, hidden_size, layers, heads)
            losses = train_masked(model, tokenizer, texts, steps, batch_size, lr)
    finally:
        torch.set_num_threads(threads)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1  # for fine-tuning
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    final = sum(losses[-100:]) / len(losses[-100:])
    log.info("tiny model: masked-token loss %.3f after %d steps", final, steps)
    return {"parameters": model.num_parameters(), "masked_token_loss": round(final, 4), "vocabulary": len(tokenizer)}


def blank_model(tokenizer: XLMRobertaTokenizer, hidden_size: int, layers: int, heads: int) -> XLMRobertaForMaskedLM:
    """A randomly initialised XLM-R for `tokenizer`."""
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=MAX_LENGTH + 2,
        type_vocab_size=1,
        initializer_range=0.05,  # the default, 0.02, is for a width of 768
        hidden_dropout_prob=0.0,  # one pass over little text: nothing to overfit, and dropout delays learning
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return XLMRobertaForMaskedLM(config)


def train_masked(
    model: XLMRobertaForMaskedLM, tokenizer: XLMRobertaTokenizer, texts: list[str], steps: int, batch_size: int, lr: float
) -> list[float]:
    """Masked language modelling on `texts`, with a progress bar; returns the loss of every step."""
    import torch
    from rich.progress import track
    from transformers import DataCollatorForLanguageModeling, get_linear_schedule_with_warmup

    model.train()
    encoded = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    losses = []
    for _ in track(range(steps), description="pre-training the tiny model (once)", transient=True):
        # batches of similar length: draw four times as many, sort, take a run
        drawn = sorted(torch.randint(len(encoded), (4 * batch_size,)).tolist(), key=lambda i: len(encoded[i]))
        start = int(torch.randint(3 * batch_size + 1, ()))
        batch = collate([{"input_ids": encoded[i]} for i in drawn[start : start + batch_size]])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

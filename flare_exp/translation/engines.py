"""Translate texts with NLLB checkpoints, by transformers or by CTranslate2 (faster on CPUs).

NLLB checkpoints are M2M100 models with FLORES-200 language codes (arXiv 2207.04672). The
translation of a text does not depend on the other texts of its batch, except for ties within
floating-point error.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import cached_file

from flare_exp.errors import UserError, first_line
from flare_exp.hub import local
from flare_exp.translation.nllb import MTDecoding, check, language_id, load_model, load_tokenizer
from flare_exp.translation.segmentation import (
    Protect,
    Translation,
    joined,
    report_finished,
    segments,
)

# A shorter row counts as this many tokens: its logits over the vocabulary cost as much as those of
# any row.
NARROWEST = 16
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


class Engine(Protocol):
    """Translates texts between languages given by the tokenizer's FLORES-200 codes (eng_Latn)."""

    def translate(
        self,
        texts: Sequence[str],
        source: str,
        target: str,
        progress: Callable[[int], None] | None = None,
        protect: Protect | None = None,
    ) -> list[Translation]:
        """Translate the texts, in the order of `texts`; equal texts are translated once.

        Args:
            texts: texts in the source language.
            source: FLORES-200 code of the source language.
            target: FLORES-200 code of the target language.
            progress: called with the number of `texts` finished since its last call.
            protect: returns the range of characters of a text that should not be split, or None.

        Raises:
            UserError: the tokenizer has no such code.
        """
        ...


def batches(lengths: Sequence[int], decoding: MTDecoding, budget: int) -> Iterator[list[int]]:
    """Yield the row numbers of each batch: rows of similar length with the same limit.

    A batch has at most `budget` tokens, counted with padding and over all beams. Long rows come
    first, so that a lack of memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for _, group in itertools.groupby(order, key=lambda i: decoding.limit(lengths[i])):
        rest = list(group)
        while rest:
            rows = max(1, budget // (max(lengths[rest[0]], NARROWEST) * decoding.beams))
            yield rest[:rows]
            rest = rest[rows:]


class _Batched(ABC):
    """Base class of both engines: everything except the decoding of a batch of token rows."""

    def __init__(self, tokenizer: Any, decoding: MTDecoding, batch_tokens: int | None, device: str):
        self.tokenizer, self.decoding, self.device = tokenizer, decoding, device
        self.batch_tokens = batch_tokens or BATCH_TOKENS[device.partition(":")[0]]

    @abstractmethod
    def _decode(self, rows: list[list[int]], target: int, limit: int) -> list[list[int]]:
        """Return the tokens after the language code `target` for each row.

        The last token is the end of the sentence or, if the sentence does not end, the one at the
        limit.
        """

    def translate(
        self,
        texts: Sequence[str],
        source: str,
        target: str,
        progress: Callable[[int], None] | None = None,
        protect: Protect | None = None,
    ) -> list[Translation]:
        """Translate the texts; see `Engine.translate`."""
        language_id(self.tokenizer, source)
        code = language_id(self.tokenizer, target)
        self.tokenizer.src_lang = source
        counts = Counter(texts)
        tokens = self._tokens(list(counts))
        parts = {text: self._parts(text, tokens, protect) for text in counts}
        rows = {part: tokens[part] for found in parts.values() for part, _ in found if part.strip()}
        done = {
            part: Translation("", False)
            for found in parts.values()
            for part, _ in found
            if part not in rows
        }
        pieces = {text: [part for part, _ in found] for text, found in parts.items()}
        report = report_finished(pieces, counts, progress)
        names = list(rows)
        for batch in batches([len(row) for row in rows.values()], self.decoding, self.batch_tokens):
            chosen = [names[i] for i in batch]
            limit = self.decoding.limit(len(rows[chosen[0]]))
            for name, row in zip(
                chosen, self._guarded([rows[name] for name in chosen], code, limit), strict=True
            ):
                ended = row[-1:] == [self.tokenizer.eos_token_id]
                done[name] = Translation(
                    self.tokenizer.decode(row, skip_special_tokens=True).strip(), not ended
                )
            report(chosen)
        whole = {
            text: joined([(done[part], separator) for part, separator in found], target)
            for text, found in parts.items()
        }
        return [whole[text] for text in texts]

    def _tokens(self, texts: list[str]) -> dict[str, list[int]]:
        # verbose=False: the tokenizer would warn of texts that are too long before they are split
        return (
            dict(zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True))
            if texts
            else {}
        )

    def _parts(
        self, text: str, tokens: dict[str, list[int]], protect: Protect | None
    ) -> list[tuple[str, str]]:
        """Return the segments of a text, and add their tokens to `tokens`."""
        if len(tokens[text]) <= self.decoding.max_length:
            return [(text, "")]
        found = segments(
            text,
            lambda part: self._length(part) <= self.decoding.max_length,
            protect(text) if protect else None,
        )
        tokens.update(self._tokens([part for part, _ in found]))
        return found

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def _guarded(self, rows: list[list[int]], target: int, limit: int) -> list[list[int]]:
        try:
            return self._decode(rows, target, limit)
        # torch.OutOfMemoryError is a RuntimeError; CTranslate2 has no class of its own
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise UserError(
                f"mt.batch_tokens={self.batch_tokens}: too much for the memory of the GPU "
                f"({len(rows)} rows of {max(map(len, rows))} tokens); choose less"
            ) from error


class TransformersEngine(_Batched):
    """Translates with transformers' own M2M100.

    Args:
        path: hub id or folder of an NLLB checkpoint.
        revision: commit or branch of a hub checkpoint.
        batch_tokens: source tokens of a batch, with padding and over all beams (see BATCH_TOKENS).
        device: cpu or cuda.
        dtype: precision of the weights. None means float32 on CPUs, and on GPUs bfloat16, or
            float16 where the GPU does not support bfloat16.

    Raises:
        UserError: the checkpoint cannot be read or is not NLLB's, or max_length is beyond its
            positions.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        decoding: MTDecoding | None = None,
        batch_tokens: int | None = None,
        device: str = "cpu",
        dtype: str | None = None,
    ):
        decoding = decoding or MTDecoding()
        super().__init__(check(path, revision, decoding), decoding, batch_tokens, device)
        self.model = load_model(path, revision, device, dtype).to(device)
        config = self.model.config
        # The checkpoint's own defaults (beams, lengths) would apply to every option not set here.
        self.model.generation_config = GenerationConfig(
            decoder_start_token_id=config.decoder_start_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            no_repeat_ngram_size=self.decoding.no_repeat_ngram,
            **self._beam_options(),
        )

    def _beam_options(self) -> dict[str, Any]:
        """Return options for beam search as in fairseq and CTranslate2.

        A sentence is finished when it has as many finished hypotheses as there are beams. Where
        repeated n-grams are ruled out, the remaining probabilities are renormalized to sum to one.
        """
        if self.decoding.beams == 1:
            return {}
        return {
            "num_beams": self.decoding.beams,
            "early_stopping": True,
            "renormalize_logits": self.decoding.no_repeat_ngram > 0,
        }

    @torch.inference_mode()
    def _decode(self, rows: list[list[int]], target: int, limit: int) -> list[list[int]]:
        pad = self.tokenizer.pad_token_id
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad
        ).to(self.device)
        # the language code does not count towards the limit
        made = self.model.generate(
            ids, attention_mask=ids != pad, forced_bos_token_id=target, max_new_tokens=limit + 1
        )
        return [_until(row[2:], self.tokenizer.eos_token_id) for row in made.tolist()]


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


class CTranslate2Engine(_Batched):
    """Translates with CTranslate2: faster on CPUs, where it can also compute with 8-bit integers.

    In 32-bit floats its translations equal those of transformers, except where beam search reaches
    the limit. With fewer bits some words change.

    Args:
        path: folder that `convert` filled.
        batch_tokens: as for transformers.
        device: as for transformers.
        dtype: computation type; None means the precision of the stored weights.

    Raises:
        UserError: CTranslate2 is not installed, or the folder cannot be used.
    """

    def __init__(
        self,
        path: str,
        decoding: MTDecoding | None = None,
        batch_tokens: int | None = None,
        device: str = "cpu",
        dtype: str | None = None,
    ):
        library = ctranslate2()
        folder = Path(path).expanduser()
        if not (folder / "model").is_dir() or not (folder / "tokenizer").is_dir():
            raise UserError(
                f"mt.path={path}: there is no converted model (model/, tokenizer/) in this folder"
            )
        decoding = decoding or MTDecoding()
        super().__init__(
            check(str(folder / "tokenizer"), None, decoding), decoding, batch_tokens, device
        )
        try:
            kind, _, number = device.partition(":")
            place = {
                "device": kind,
                "device_index": int(number or 0),
                "intra_threads": torch.get_num_threads(),
            }
            self.model = library.Translator(
                str(folder / "model"), compute_type=dtype or "default", **place
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"mt.path={path}: CTranslate2 cannot use it: {first_line(error)}"
            ) from error

    def _decode(self, rows: list[list[int]], target: int, limit: int) -> list[list[int]]:
        code = self.tokenizer.convert_ids_to_tokens(target)
        results = self.model.translate_batch(
            [self.tokenizer.convert_ids_to_tokens(row) for row in rows],
            [[code]] * len(rows),
            beam_size=self.decoding.beams,
            no_repeat_ngram_size=self.decoding.no_repeat_ngram,
            max_input_length=0,
            max_decoding_length=limit + 1,
            return_end_token=True,
        )
        return [
            self.tokenizer.convert_tokens_to_ids(result.hypotheses[0][1:]) for result in results
        ]


def ctranslate2() -> Any:
    """Import and return the CTranslate2 library.

    Raises:
        UserError: CTranslate2 is not installed.
    """
    try:
        import ctranslate2 as library
    except ImportError as error:
        raise UserError(
            "mt.backend=ctranslate2 needs pip install 'flare_exp[ct2]'; or choose "
            "mt.backend=transformers"
        ) from error
    return library


def convert(path: str, revision: str | None, folder: Path, quantization: str) -> None:
    """Convert an NLLB checkpoint for `CTranslate2Engine`, into model/ and tokenizer/ of `folder`.

    Args:
        path: hub id or folder of the checkpoint.
        revision: revision of the hub id, or None for the hub's default.
        folder: destination.
        quantization: quantization of the weights: int8 for CPUs, int8_float16 or float16 for GPUs.

    Raises:
        UserError: CTranslate2 is not installed, or the checkpoint cannot be read or converted.
    """
    ctranslate2()
    from ctranslate2.converters import TransformersConverter

    tokenizer, model = load_tokenizer(path, revision), load_model(path, revision, "cpu", "float32")

    class Converter(TransformersConverter):
        # The library's own method loads the tokenizer of the newest revision, not of `revision`.
        def load_model(self, *_, **__):
            return model

        def load_tokenizer(self, *_, **__):
            return tokenizer

    # A folder (the one in the hub's cache for a hub id), so that the configuration is of this
    # revision as well.
    checkpoint = Path(str(cached_file(local(path), "config.json", revision=revision))).parent
    try:
        Converter(str(checkpoint)).convert(str(folder / "model"), quantization=quantization)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"mt.path={path}: CTranslate2 cannot convert it: {first_line(error)}"
        ) from error
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    model.config.save_pretrained(str(folder / "tokenizer"))

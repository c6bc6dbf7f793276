"""Machine translation with NLLB checkpoints (M2M100 models with FLORES-200 language codes, arXiv 2207.04672): texts in, texts
out, by transformers or, faster on CPUs, by CTranslate2. What a text becomes does not depend on the texts beside it, but for
ties within floating-point error.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import cached_file

from flare_exp.errors import UserError, first_line
from flare_exp.hub import local
from flare_exp.translation.nllb import Decoding, check, language_id, load_model, load_tokenizer
from flare_exp.translation.segmentation import Protect, Translated, joined, segments

NARROWEST = 16  # a shorter row counts as this many tokens: its logits over the vocabulary cost as much as any row's
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
QUANTIZATIONS = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
)


class Engine(Protocol):
    """Translates texts between languages that are given by the tokenizer's FLORES-200 codes, e.g. eng_Latn."""

    def translate(
        self,
        texts: Sequence[str],
        source: str,
        target: str,
        progress: Callable[[int], None] | None = None,
        protect: Protect | None = None,
    ) -> list[Translated]:
        """The translations, in the order of `texts`; equal texts are translated once.

        Args:
            progress: told how many of `texts` are finished since it was last told.
            protect: the range of characters of a text that should not be split, if it has one.

        Raises:
            UserError: the tokenizer does not know a code.
        """
        ...


def batches(lengths: Sequence[int], decoding: Decoding, budget: int) -> Iterator[list[int]]:
    """Numbers of the rows of each batch: rows of similar length and of one limit, at most `budget` tokens with padding and
    over all beams. Long ones come first, so that too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for _, group in itertools.groupby(order, key=lambda i: decoding.limit(lengths[i])):
        rest = list(group)
        while rest:
            rows = max(1, budget // (max(lengths[rest[0]], NARROWEST) * decoding.beams))
            yield rest[:rows]
            rest = rest[rows:]


class _Batched(ABC):
    """What both engines share: all but how a batch of token rows is decoded."""

    def __init__(self, tokenizer: Any, decoding: Decoding, batch_tokens: int | None, device: str):
        self.tokenizer, self.decoding, self.device = tokenizer, decoding, device
        self.batch_tokens = batch_tokens or BATCH_TOKENS[device.partition(":")[0]]

    @abstractmethod
    def _decode(self, rows: list[list[int]], target: int, limit: int) -> list[list[int]]:
        """Tokens after the language code `target`, the last of them the end of the sentence or, where there is none, the one at
        the limit."""

    def translate(
        self,
        texts: Sequence[str],
        source: str,
        target: str,
        progress: Callable[[int], None] | None = None,
        protect: Protect | None = None,
    ) -> list[Translated]:
        """See `Engine`."""
        language_id(self.tokenizer, source)
        code = language_id(self.tokenizer, target)
        self.tokenizer.src_lang = source
        counts = Counter(texts)
        tokens = self._tokens(list(counts))
        parts = {text: self._parts(text, tokens, protect) for text in counts}
        rows = {part: tokens[part] for found in parts.values() for part, _ in found if part.strip()}
        done = {
            part: Translated("", False)
            for found in parts.values()
            for part, _ in found
            if part not in rows
        }
        report = _finished(parts, counts, set(rows), progress)
        names = list(rows)
        for batch in batches([len(row) for row in rows.values()], self.decoding, self.batch_tokens):
            chosen = [names[i] for i in batch]
            limit = self.decoding.limit(len(rows[chosen[0]]))
            for name, row in zip(
                chosen, self._guarded([rows[name] for name in chosen], code, limit), strict=True
            ):
                ended = row[-1:] == [self.tokenizer.eos_token_id]
                done[name] = Translated(
                    self.tokenizer.decode(row, skip_special_tokens=True).strip(), not ended
                )
            report(chosen)
        whole = {
            text: joined([(done[part], separator) for part, separator in found], target)
            for text, found in parts.items()
        }
        return [whole[text] for text in texts]

    def _tokens(self, texts: list[str]) -> dict[str, list[int]]:
        # verbose: the tokenizer would warn of texts that are too long, before they are split
        return (
            dict(zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True))
            if texts
            else {}
        )

    def _parts(
        self, text: str, tokens: dict[str, list[int]], protect: Protect | None
    ) -> list[tuple[str, str]]:
        """The segments of a text; adds their tokens to `tokens`."""
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
        except (
            RuntimeError
        ) as error:  # torch.OutOfMemoryError is one; CTranslate2 has no class of its own
            if "out of memory" not in str(error):
                raise
            raise UserError(
                f"mt.batch_tokens={self.batch_tokens}: too much for the memory of the GPU "
                f"({len(rows)} rows of {max(map(len, rows))} tokens); choose less"
            ) from error


def _finished(
    parts: dict[str, list[tuple[str, str]]],
    counts: Counter[str],
    pending: set[str],
    progress: Callable[[int], None] | None,
) -> Callable[[Sequence[str]], None]:
    """A function that is told of translated segments and tells `progress` of the texts that they complete."""
    users, left = defaultdict(list), {}
    for text, found in parts.items():
        missing = {part for part, _ in found} & pending
        left[text] = len(missing)
        for part in missing:
            users[part].append(text)

    def report(chosen: Sequence[str]) -> None:
        complete = 0
        for text in itertools.chain.from_iterable(users[part] for part in chosen):
            left[text] -= 1
            complete += 0 if left[text] else counts[text]
        if complete and progress:
            progress(complete)

    if progress and (blank := sum(counts[text] for text, missing in left.items() if not missing)):
        progress(blank)
    return report


class TransformersEngine(_Batched):
    """Translates with transformers' own M2M100.

    Args:
        path, revision: hub id or folder of an NLLB checkpoint.
        batch_tokens: source tokens of a batch, with padding and over all beams (see BATCH_TOKENS).
        device: cpu or cuda.
        dtype: of the weights; None: float32 on CPUs; bfloat16, or float16 where that is unknown, on GPUs.

    Raises:
        UserError: the checkpoint cannot be read or is not NLLB's, or max_length is beyond its positions.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        decoding: Decoding | None = None,
        batch_tokens: int | None = None,
        device: str = "cpu",
        dtype: str | None = None,
    ):
        decoding = decoding or Decoding()
        super().__init__(check(path, revision, decoding), decoding, batch_tokens, device)
        self.model = load_model(path, revision, device, dtype).to(device)
        config = self.model.config
        # A checkpoint's own habits (beams, lengths) would fill in whatever is not said here.
        self.model.generation_config = GenerationConfig(
            decoder_start_token_id=config.decoder_start_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            no_repeat_ngram_size=self.decoding.no_repeat_ngram,
            **self._beam_options(),
        )

    def _beam_options(self) -> dict[str, Any]:
        """Beam search as in fairseq and CTranslate2: a sentence is done with its `beams`-th finished hypothesis, and where
        n-grams are ruled out, the probabilities of what is left add up to one."""
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
        # the language code comes on top of the limit
        made = self.model.generate(
            ids, attention_mask=ids != pad, forced_bos_token_id=target, max_new_tokens=limit + 1
        )
        return [_until(row[2:], self.tokenizer.eos_token_id) for row in made.tolist()]


def _until(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row


class CTranslate2Engine(_Batched):
    """Translates with CTranslate2: faster on CPUs, where it can also compute with 8-bit integers.

    In 32-bit floats it gives what transformers gives, but for translations that beam search cuts at their limit; with fewer
    bits some words change.

    Args:
        path: folder that `convert` filled.
        batch_tokens, device: as for transformers.
        dtype: computation type; None: that of the stored weights.

    Raises:
        UserError: CTranslate2 is not installed, or the folder cannot be used.
    """

    def __init__(
        self,
        path: str,
        decoding: Decoding | None = None,
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
        decoding = decoding or Decoding()
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
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ctranslate2 as library
    except ImportError as error:
        raise UserError(
            "mt.backend=ctranslate2 needs pip install 'flare_exp[ct2]'; or choose mt.backend=transformers"
        ) from error
    return library


def convert(path: str, revision: str | None, folder: Path, quantization: str) -> None:
    """Writes an NLLB checkpoint for `CTranslate2Engine` into `folder`: model/ and tokenizer/.

    Args:
        quantization: of the weights (QUANTIZATIONS): int8 for CPUs, int8_float16 or float16 for GPUs.

    Raises:
        UserError: CTranslate2 is not installed, or the checkpoint cannot be read or converted.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"mt.quantization={quantization}: choose one of {', '.join(QUANTIZATIONS)}")
    ctranslate2()
    from ctranslate2.converters import TransformersConverter

    tokenizer, model = load_tokenizer(path, revision), load_model(path, revision, "cpu", "float32")

    class Converter(TransformersConverter):
        # The library's own takes the tokenizer of the newest revision, whichever is asked for.
        def load_model(self, *_, **__):
            return model

        def load_tokenizer(self, *_, **__):
            return tokenizer

    # the folder, in the hub's cache too, so that the configuration is of this revision as well
    checkpoint = Path(str(cached_file(local(path), "config.json", revision=revision))).parent
    try:
        Converter(str(checkpoint)).convert(str(folder / "model"), quantization=quantization)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"mt.path={path}: CTranslate2 cannot convert it: {first_line(error)}"
        ) from error
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    model.config.save_pretrained(str(folder / "tokenizer"))

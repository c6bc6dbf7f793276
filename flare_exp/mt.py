"""Machine translation with NLLB checkpoints (M2M100 models with FLORES-200 language codes, arXiv 2207.04672): texts in, texts
out, by transformers or, faster on CPUs, by CTranslate2. What a text becomes does not depend on the texts beside it, but for
ties within floating-point error.
"""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, M2M100ForConditionalGeneration, NllbTokenizer
from transformers.utils import cached_file

from flare_exp.backbones import check_vocabulary
from flare_exp.errors import UNREADABLE, UserError, why_unreadable
from flare_exp.finite import check_finite
from flare_exp.hub import local, looks_local

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
NARROWEST = 16  # a shorter row counts as this many tokens: its logits over the vocabulary cost as much as any row's
QUANTIZATIONS = ("float32", "float16", "bfloat16", "int8", "int8_float32", "int8_float16", "int8_bfloat16")
UNSPACED = {"Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"}  # scripts without white space between sentences
RANDOM = ("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")

Span = tuple[int, int]


@dataclass(frozen=True)
class Decoding:
    """Options that change what comes out.

    Args:
        beams: hypotheses of beam search (length penalty 1); 1: greedy.
        max_length: longest segment of a source text and longest translation of one, in tokens, language code and end included.
        no_repeat_ngram: no run of so many tokens comes twice in a translation, against loops; 0: off.
    """

    beams: int = 1
    max_length: int = 256
    no_repeat_ngram: int = 0

    def __post_init__(self):
        for name, least in (("beams", 1), ("max_length", 8), ("no_repeat_ngram", 0)):
            if getattr(self, name) < least:
                raise UserError(f"mt.{name}={getattr(self, name)}: at least {least}")

    def limit(self, source_tokens: int) -> int:
        """Tokens that the translation of a segment may have.

        Three for each of the source's and some more, so that a row which loops does not hold its batch up to max_length. In
        steps of 32: rows of one limit make batches of their own, and neither engine needs to know limits of rows.
        """
        return min(self.max_length, 32 * -(-(3 * source_tokens + 32) // 32))


@dataclass(frozen=True)
class Translated:
    """A text's translation. `truncated`: that of a segment reached its limit without coming to an end."""

    text: str
    truncated: bool


Protect = Callable[[str], Span | None]


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


# --- checkpoints -----------------------------------------------------------------------------------------------------


def check(path: str, revision: str | None = None, decoding: Decoding | None = None) -> Any:
    """Reads the configuration and the tokenizer of a checkpoint (hub id or folder), no weights.

    Returns:
        the tokenizer, for `language_id`.

    Raises:
        UserError: they cannot be read, are not those of an NLLB checkpoint or do not fit one another, or max_length is beyond its
            positions.
    """
    config = read_config(path, revision)
    positions = config.max_position_embeddings
    # a translation starts with two tokens that do not count: the decoder's own and the language code
    if decoding and decoding.max_length + 2 > positions:
        raise UserError(f"mt.max_length={decoding.max_length}: the translation model knows {positions} positions; choose less")
    tokenizer = _tokenizer(path, revision)
    check_vocabulary(tokenizer, config.vocab_size, f"mt.path={path}")
    return tokenizer


def load_model(path: str, revision: str | None, device: str, dtype: str | None = None) -> Any:
    """The whole model, frozen, without dropout. `dtype`: None: 32-bit floats on CPUs, 16-bit on GPUs.

    Raises:
        UserError: missing, truncated or incomplete weights, or NaN among them.
    """
    from safetensors import SafetensorError

    read_config(path, revision)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device: a GPU is asked for, but torch finds none")
    # M2M100 leaves out a layer in twenty while it trains; nothing may bring that back
    options: dict[str, Any] = dict.fromkeys(RANDOM, 0.0)
    options |= {"revision": revision, "dtype": getattr(torch, dtype or _dtype(device)), "output_loading_info": True}
    try:
        loaded: Any = M2M100ForConditionalGeneration.from_pretrained(local(path), **options)
    except (*UNREADABLE, SafetensorError) as error:
        raise UserError(f"mt.path={path}: its weights could not be read: {why_unreadable(error)}") from error
    model, report = loaded
    if lost := sorted(report["missing_keys"]):
        raise UserError(f"mt.path={path}: the checkpoint lacks {len(lost)} weights ({', '.join(lost[:3])}, ...)")
    check_finite(model.named_parameters(), f"mt.path={path}")
    return model.requires_grad_(False).eval()


def load_encoder(path: str, revision: str | None = None, device: str = "cpu") -> tuple[nn.Module, Any]:
    """The encoder alone, frozen, and the tokenizer. encoder(input_ids, attention_mask).last_hidden_state, [B, S, d_mt], comes
    after the final layer norm.

    Raises:
        UserError: see `check` and `load_model`.
    """
    tokenizer = check(path, revision)
    # only the encoder is moved, and nothing holds the decoder when this returns
    return load_model(path, revision, device).get_encoder().to(device), tokenizer


def read_config(path: str, revision: str | None) -> Any:
    if looks_local(path) and not (Path(path).expanduser() / "config.json").is_file():
        raise UserError(f"mt.path={path}: there is no checkpoint (config.json) in this folder")
    try:
        config = AutoConfig.from_pretrained(local(path), revision=revision)
    except (OSError, ValueError) as error:
        instead = "" if looks_local(path) else "\n  without network, fetch it with prefetch, or choose mt=gold or mt=file"
        raise UserError(f"mt.path={path}: its configuration could not be read: {_first_line(error)}{instead}") from error
    if config.model_type != "m2m_100":
        raise UserError(
            f"mt.path={path}: the architecture {config.model_type!r} is not NLLB's; "
            "give a dense NLLB checkpoint, e.g. facebook/nllb-200-distilled-600M"
        )
    return config


def _tokenizer(path: str, revision: str | None) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(local(path), revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"mt.path={path}: its tokenizer could not be read: {_first_line(error)}") from error
    if not isinstance(tokenizer, NllbTokenizer):
        raise UserError(f"mt.path={path}: its tokenizer is {type(tokenizer).__name__}; NLLB's is needed, with FLORES-200 codes")
    return tokenizer


def language_id(tokenizer: Any, code: str) -> int:
    """The token of a language code.

    Raises:
        UserError: the tokenizer does not know it; names similar codes.
    """
    # an ordinary piece of the vocabulary is no language, and an unknown code would silently become <unk>
    usual = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, tokenizer.mask_token}
    codes = {token: number for token, number in tokenizer.get_added_vocab().items() if token not in usual}
    if code not in codes:
        near = difflib.get_close_matches(code, codes, 5, 0.5) or sorted(codes)[:5]
        raise UserError(f"the translation model does not know the language {code!r}; it knows codes such as {', '.join(near)}")
    return codes[code]


def _dtype(device: str) -> str:
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- from texts to segments and back ---------------------------------------------------------------------------------

# Ends of sentences with the white space after them. Where scripts write none there, none is needed.
SENTENCE_END = re.compile(r"[.!?…؟۔।॥።]+[\"'”’»)\]]*\s+|[。！？｡]+[”’」』）]*\s*|\n\s*")  # noqa: RUF001
WORD_END = re.compile(r"\s+")


def segments(text: str, fits: Callable[[str], bool], keep: Span | None = None) -> list[tuple[str, str]]:
    """`text` in segments that fit, each with the white space after it: as many whole sentences as fit, or else words, or else
    characters.

    Args:
        fits: whether a segment is short enough; what is shorter should fit too.
        keep: range of characters that no two segments share, unless it does not fit by itself.

    Returns:
        (segment, separator) pairs; put together they are `text`.
    """
    if fits(text):
        return [(text, "")]
    first, last = keep if keep and fits(text[slice(*keep)]) else (0, 0)
    every = range(1, len(text))
    cuts = (
        [match.end() for match in SENTENCE_END.finditer(text)],
        [match.end() for match in WORD_END.finditer(text)],
        # not between a letter and its combining marks
        [i for i in every if not unicodedata.category(text[i]).startswith("M")],
    )
    levels = [[i for i in level if not first < i < last] for level in cuts]
    found, start = [], 0
    while start < len(text):
        stop = _farthest(text, start, [*levels, every], fits)
        segment = text[start:stop].rstrip()
        found.append((segment, text[start + len(segment) : stop]))
        start = stop
    return found


def _farthest(text: str, start: int, levels: Sequence[Sequence[int]], fits: Callable[[str], bool]) -> int:
    """The last place to cut, of the first level that has one, up to which `text` fits from `start` on."""
    for level in levels:
        cuts = [cut for cut in level if cut > start] + [len(text)]

        def good(number: int, cuts: Sequence[int] = cuts) -> bool:
            return number < len(cuts) and fits(text[start : cuts[number]].rstrip())

        if not good(0):
            continue
        # doubling steps, then halving: texts to measure stay short
        low, step = 0, 1
        while good(low + step):
            low, step = low + step, 2 * step
        while step > 1:
            step //= 2
            if good(low + step):
                low += step
        return cuts[low]
    return start + 1  # not even one character fits: it has to go as it is


def joined(parts: Sequence[tuple[Translated, str]], target: str) -> Translated:
    """The translation of a text, from those of its segments and the separators they had. Where the source writes no white
    space between sentences, `target` may want some."""
    space = "" if target.rpartition("_")[2] in UNSPACED else " "
    text = "".join(part.text + (separator or space) for part, separator in parts[:-1]) + parts[-1][0].text
    return Translated(text, any(part.truncated for part, _ in parts))


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


# --- engines ---------------------------------------------------------------------------------------------------------


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
        done = {part: Translated("", False) for found in parts.values() for part, _ in found if part not in rows}
        report = _finished(parts, counts, set(rows), progress)
        names = list(rows)
        for batch in batches([len(row) for row in rows.values()], self.decoding, self.batch_tokens):
            chosen = [names[i] for i in batch]
            limit = self.decoding.limit(len(rows[chosen[0]]))
            for name, row in zip(chosen, self._guarded([rows[name] for name in chosen], code, limit), strict=True):
                ended = row[-1:] == [self.tokenizer.eos_token_id]
                done[name] = Translated(self.tokenizer.decode(row, skip_special_tokens=True).strip(), not ended)
            report(chosen)
        whole = {text: joined([(done[part], separator) for part, separator in found], target) for text, found in parts.items()}
        return [whole[text] for text in texts]

    def _tokens(self, texts: list[str]) -> dict[str, list[int]]:
        # verbose: the tokenizer would warn of texts that are too long, before they are split
        return dict(zip(texts, self.tokenizer(texts, verbose=False)["input_ids"], strict=True)) if texts else {}

    def _parts(self, text: str, tokens: dict[str, list[int]], protect: Protect | None) -> list[tuple[str, str]]:
        """The segments of a text; adds their tokens to `tokens`."""
        if len(tokens[text]) <= self.decoding.max_length:
            return [(text, "")]
        found = segments(text, lambda part: self._length(part) <= self.decoding.max_length, protect(text) if protect else None)
        tokens.update(self._tokens([part for part, _ in found]))
        return found

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def _guarded(self, rows: list[list[int]], target: int, limit: int) -> list[list[int]]:
        try:
            return self._decode(rows, target, limit)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; CTranslate2 has no class of its own
            if "out of memory" not in str(error):
                raise
            raise UserError(
                f"mt.batch_tokens={self.batch_tokens}: too much for the memory of the GPU "
                f"({len(rows)} rows of {max(map(len, rows))} tokens); choose less"
            ) from error


def _finished(
    parts: dict[str, list[tuple[str, str]]], counts: Counter[str], pending: set[str], progress: Callable[[int], None] | None
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
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad).to(self.device)
        # the language code comes on top of the limit
        made = self.model.generate(ids, attention_mask=ids != pad, forced_bos_token_id=target, max_new_tokens=limit + 1)
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
            raise UserError(f"mt.path={path}: there is no converted model (model/, tokenizer/) in this folder")
        decoding = decoding or Decoding()
        super().__init__(check(str(folder / "tokenizer"), None, decoding), decoding, batch_tokens, device)
        try:
            kind, _, number = device.partition(":")
            place = {"device": kind, "device_index": int(number or 0), "intra_threads": torch.get_num_threads()}
            self.model = library.Translator(str(folder / "model"), compute_type=dtype or "default", **place)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"mt.path={path}: CTranslate2 cannot use it: {_first_line(error)}") from error

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
        return [self.tokenizer.convert_tokens_to_ids(result.hypotheses[0][1:]) for result in results]


def ctranslate2() -> Any:
    """The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        import ctranslate2 as library
    except ImportError as error:
        raise UserError("mt.backend=ctranslate2 needs pip install 'flare_exp[ct2]'; or choose mt.backend=transformers") from error
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

    tokenizer, model = _tokenizer(path, revision), load_model(path, revision, "cpu", "float32")

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
        raise UserError(f"mt.path={path}: CTranslate2 cannot convert it: {_first_line(error)}") from error
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    model.config.save_pretrained(str(folder / "tokenizer"))


# --- what can be told of a translation without a reference -----------------------------------------------------------

REPEATED = re.compile(r"(.{1,80}?)\1{2,}", re.DOTALL)


def flags(source: str, translation: Translated) -> dict[str, bool]:
    """Signs of a bad translation; each is False for a good one, and now and then for a bad one.

    truncated: it came to no end. empty: nothing is left of the source. repetitive: it says something five times or more in a
    row, and at least twice more than the source does. copy: it is the source, but for case and white space.
    """
    text = translation.text
    return {
        "truncated": translation.truncated,
        "empty": bool(source.strip()) and not text.strip(),
        "repetitive": _repeats(text) > max(4, _repeats(source) + 1),
        "copy": bool(text.strip()) and _bare(text) == _bare(source),
    }


def _repeats(text: str) -> int:
    """How often the most repeated run of at most 80 characters, letters among them, comes in a row; 0 when below three."""
    found = [match for match in REPEATED.finditer(text + " ") if any(c.isalpha() for c in match[1])]
    return max((len(match[0]) // len(match[1]) for match in found), default=0)


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()


# --- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` texts, with texts per second and the time left; gives the function that moves it on.

    Long texts come first, so the time left is estimated too long rather than too short.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} texts/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    # a console of its own: rich's common one decides for good, when it is first asked for, whether it is on a terminal
    with Progress(*columns, console=Console(), transient=True, speed_estimate_period=300) as progress:
        task = progress.add_task(description, total=total)
        yield lambda finished: progress.advance(task, finished)

"""Write the Python code that loads an exported folder, for its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flare_exp.export.portable import Origin

# task_type of PEFT -> class of transformers
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def code_of_run(reading: Mapping[str, Any]) -> list[str]:
    """Return the lines that load `folder` with `flare_exp.load` and predict.

    Args:
        reading: what reading.json holds.
    """
    fields, parts = reading["fields"], reading["source_texts"]
    one, sources, comment = _literal([f"a {name}" for name in fields]), "", ""
    if parts == fields:
        sources, comment = f", sources=[{one}]", "  # sources: English translations of the texts"
    elif parts:
        sources = f", sources=[{_literal([f'a text, {part}' for part in parts])}]"
        comment = f"  # sources: {', '.join(parts)} of each text"
    return [
        "run = flare_exp.load(folder)",
        f"print(run.predict([{one}]{sources})){comment}",
    ]


def _literal(texts: Sequence[str]) -> str:
    """Return one text, or a tuple of several, as Python writes it."""
    return repr(texts[0] if len(texts) == 1 else tuple(texts))


def imports_of_lora(reading: Mapping[str, Any], task_type: str) -> list[str]:
    """Return the imports of `code_of_lora`."""
    quantized = ["BitsAndBytesConfig"] if reading["weights"]["quantize"] else []
    names = [*sorted([CLASSES[task_type], "AutoTokenizer", *quantized]), "logging"]
    return [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {', '.join(names)}",
    ]


def code_of_lora(reading: Mapping[str, Any], task_type: str, base: Origin | None) -> list[str]:
    """Return the lines that load `folder` with transformers and PEFT alone, and predict.

    Args:
        reading: what reading.json holds.
        task_type: that of PEFT.
        base: origin of the model below the LoRA; None: it is in `base/` of the folder.
    """
    place = 'f"{folder}/base"' if base is None else repr(base.hub_id)
    revision = [] if base is None else [f"revision={base.commit!r}"]
    model = ", ".join([place, *revision, *_model_options(reading)])
    sides = [f"{name}={reading[name]!r}" for name in ("padding_side", "truncation_side")]
    tokenizer = ", ".join([place, *revision, *sides])
    return [
        "logging.set_verbosity_error()  # no report that the head is new: the next line fills it",
        f"model = {CLASSES[task_type]}.from_pretrained({model})",
        "model = PeftModel.from_pretrained(model, folder).eval()",
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        *_prediction(reading, task_type),
    ]


def _model_options(reading: Mapping[str, Any]) -> list[str]:
    """Return the arguments with which the model below was loaded."""
    options, weights = [], reading["weights"]
    if reading["task_type"] == "label":
        options.append(f"num_labels={len(reading['labels'])}")
    if weights["quantize"]:
        settings = "load_in_4bit=True, bnb_4bit_quant_type=" + repr(weights["quantize"])
        settings += f", bnb_4bit_use_double_quant={weights['double_quant']}"
        settings += f", bnb_4bit_compute_dtype=torch.{weights['compute_dtype']}"
        settings += f", llm_int8_skip_modules={weights['unquantized']}"
        options.append(f"quantization_config=BitsAndBytesConfig({settings})")
    options.append(f"dtype=torch.{weights['dtype']}")
    return [*options, f"attn_implementation={reading['attention']!r}"]


def _prediction(reading: Mapping[str, Any], task_type: str) -> list[str]:
    """Return the lines that read one example and print its answer."""
    named = {name: f"a {name}" for name in reading["fields"]}
    texts = ", ".join(f'["{named[name]}"]' for name in reading["order"])
    cut = "'only_second'" if task_type == "QUESTION_ANS" else "True"
    options = f"truncation={cut}, max_length={reading['max_length']}, padding=True, "
    lines = []
    if reading["prompt"]:
        options = ""  # decoders may have no padding token
        texts = f"[{reading['prompt'].format(**named)!r}]"
        lines = [f"# the prompt has to fit in {reading['max_length']} tokens: cut the text in it"]
    elif reading["doc_stride"] is not None:
        lines = ["# what fits of the context alone; the run reads a long one in several windows"]
    lines += [
        f'inputs = tokenizer({texts}, {options}return_tensors="pt").to(model.device)',
        "with torch.no_grad():",
    ]
    if task_type == "SEQ_CLS":
        return [
            *lines,
            "    logits = model(**inputs).logits",
            f"print([{reading['labels']!r}[i] for i in logits.argmax(-1)])",
        ]
    if task_type == "QUESTION_ANS":
        return [
            *lines,
            "    output = model(**inputs)",
            "in_context = torch.tensor([part == 1 for part in inputs.sequence_ids(0)])",
            "starts, ends = output.start_logits[0].cpu(), output.end_logits[0].cpu()",
            "first = starts.where(in_context, -torch.inf).argmax()",
            "last = first + ends.where(in_context, -torch.inf)[first:].argmax()",
            "print(tokenizer.decode(inputs.input_ids[0, first : last + 1]))",
        ]
    start = "inputs.input_ids.shape[1] :" if task_type == "CAUSAL_LM" else ":"
    return [
        *lines,
        "    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)",
        f"print(tokenizer.decode(tokens[0, {start}], skip_special_tokens=True))",
    ]

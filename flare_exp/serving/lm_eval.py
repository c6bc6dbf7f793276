"""Score a generative run on its own test set with lm-evaluation-harness.

The harness imports this module where a task's YAML file names `RunTask`, which registers the model
`flare_exp` at the same time. Model and task read the run folder of `--model_args run=FOLDER`:

    task: flare_exp_run
    class: !function flare_exp.serving.lm_eval.RunTask

A request names the document that it belongs to. The model answers it as the run did: with the
document's source, in the batches of the run. So the scores are those of metrics.json.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task, TaskConfig

import flare_exp
from flare_exp.data.generation import GenerationPreprocessor
from flare_exp.errors import UserError
from flare_exp.experiment.overriding import KEYS, is_allowed
from flare_exp.serving.prediction import same_texts, stored_predictions
from flare_exp.utils.suggestions import nearest


class OwnTestSet:
    """The test set of a generative run, and what the run says about each example.

    Examples are read in the order of the run, up to the last one that was asked for.

    Args:
        folder: the run folder.
        *options: as of `flare_exp.load`.

    Attributes:
        labels: the labels whose likelihoods are compared; none where the run writes answers.
        documents: id, prompt, fields, source and right answers of each example.

    Raises:
        UserError: there is no finished run, it is not generative, or its test data have changed.
    """

    def __init__(self, folder: str, *options: str):
        self.run = run = flare_exp.load(folder, *options)
        preprocessor = run.run.preprocessor
        if not isinstance(preprocessor, GenerationPreprocessor):
            raise UserError(
                f"run={folder}: model {run.run.cfg.model.name} answers {run.task.name} by a head; "
                "give a generative run (a decoder or an encoder-decoder)"
            )
        self.preprocessor = preprocessor
        if len(run.predictors) > 1:
            raise UserError(
                f"run={folder}: averages {' and '.join(run.predictors)}, and the harness compares "
                "the likelihoods of one model; give predict.sources=[given], or the run of a member"
            )
        if not (run.folder / "predictions.parquet").is_file():
            raise UserError(f"run={folder}: has no predictions.parquet; give a whole run folder")
        (self.dataset,) = tests = run.test_set()
        if not same_texts(run, tests, stored_predictions(run)):
            raise UserError(
                f"run={folder}: the test data, or their translations, are not those that the run "
                "read; give back its data"
            )
        scores = run.run.cfg.decode.name == "score"
        self.labels: tuple[str, ...] = tuple(run.task.labels) if scores else ()
        self.documents = [self._document(i) for i in range(len(self.dataset.pairs))]
        self.numbers = {document["id"]: i for i, document in enumerate(self.documents)}
        said: Iterator[Any] = (
            run.first.likelihoods(self.dataset) if self.labels else run.answers(tests)
        )
        self._known, self._left = [], said  # type: tuple[list[Any], Iterator[Any]]

    def _document(self, number: int) -> dict[str, Any]:
        pair = self.dataset.pairs[number]
        texts = dict(zip(self.run.task.fields, pair.target.texts, strict=True))
        return {
            "id": pair.target.id,
            "prompt": self.preprocessor.prompt(pair.target.texts),
            **{f"text_{name}": text for name, text in texts.items()},
            "source": None if pair.source is None else list(pair.source.texts),
            "gold": list(self.run.task.gold(pair.scored)),
        }

    @property
    def metrics(self) -> Mapping[str, float]:
        """Return the scores of the run: the block `test` of its metrics.json."""
        return json.loads((self.run.folder / "metrics.json").read_text())["test"]

    def said(self, number: int) -> Any:
        """Return the log-likelihoods of the labels for an example, or the answer to it."""
        while len(self._known) <= number:
            self._known.append(next(self._left))
        return self._known[number]

    def number_of(self, request: Instance) -> int:
        """Return the number of the example that a request belongs to.

        Raises:
            UserError: it is none of the run's own, or its prompt was changed.
        """
        prompt, _, name = (*request.args, None, None)[:3]
        number = self.numbers.get(name)
        if number is None or prompt != self.documents[number]["prompt"]:
            raise UserError(
                f"task {request.task_name}: model flare_exp answers the prompts of its run's own "
                "test set alone, since a new text has no source; give the task of RunTask, without "
                "examples, instructions or a chat template"
            )
        return number

    def score(self, name: str, found: Sequence[tuple[int, str]]) -> float:
        """Return a metric of the run's task. `found`: number and prediction of some examples."""
        examples = [self.dataset.pairs[number].scored for number, _ in found]
        return self.run.task.score([text for _, text in found], examples)[name]


# the model and the task of one evaluation share the run
load = functools.lru_cache(maxsize=1)(OwnTestSet)


def own_test_set(given: Mapping[str, Any]) -> OwnTestSet:
    """Return the test set of the run that `--model_args` name.

    Raises:
        UserError: an argument is wrong, or `OwnTestSet` cannot be made.
    """
    words = {name: _word(name, value) for name, value in given.items() if name != "run"}
    problems = [
        f"model_args: {word}: there is no such argument; choose one of run, mt, mt.*, "
        f"{', '.join(KEYS)}{nearest(name, ('run', 'mt', *KEYS))}"
        for name, word in words.items()
        if not is_allowed(word)
    ]
    if "run" not in given:
        problems.append("model_args: run is missing; give run=<run folder>")
    if problems:
        raise UserError("; ".join(problems))
    return load(str(given["run"]), *words.values())


def _word(name: str, value: Any) -> str:
    """Write an argument as on the command line; the harness has made a value of it."""
    return f"{name}={json.dumps(value) if value is None or isinstance(value, bool) else value}"


@register_model("flare_exp")
class RunModel(LM):
    """The model of a run, for the requests of `RunTask`.

    Args:
        batch_size: ignored; the batches are those of the run, or data.batch_size=N.
        max_batch_size: ignored, too.
        device: ignored, since the harness always gives one; trainer.accelerator=... chooses it.
        **given: `run`, the run folder, and the options of `flare_exp.load`.

    Raises:
        UserError: an argument is wrong, or there is no finished generative run.
    """

    def __init__(
        self,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **given: Any,
    ):
        super().__init__()
        self.tests = own_test_set(given)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each label after its prompt, EOS included.

        Whether it is what greedy decoding writes is not computed: False.

        Raises:
            UserError: a request is not of the run's own test set.
        """
        tests, found = self.tests, []
        for request in requests:
            number, label = tests.number_of(request), request.args[1].strip()
            found.append((tests.said(number)[tests.labels.index(label)], False))
        return found

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each prompt, decoded as the run did.

        Raises:
            UserError: a request is not of the run's own test set.
        """
        return [self.tests.said(self.tests.number_of(request)) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse: a text has no likelihood without a source.

        Raises:
            UserError: always.
        """
        raise UserError("model flare_exp gives no likelihood of whole texts")


class RunTask(Task):
    """The test set of the run that `--model_args run=FOLDER` names, scored by its own metrics.

    Args:
        config: configuration of the harness; its `metadata` has the arguments of the model.

    Raises:
        UserError: an argument is wrong, or there is no finished generative run.
    """

    VERSION = 1

    def __init__(self, config: Mapping[str, Any] | None = None):
        super().__init__()
        given = (config or {}).get("metadata") or {}
        own = {k: v for k, v in given.items() if k == "run" or is_allowed(k)}
        self.tests = own_test_set(own)
        self.OUTPUT_TYPE = "multiple_choice" if self.tests.labels else "generate_until"
        self._config = TaskConfig(
            task=(config or {}).get("task", "flare_exp_run"),
            output_type=self.OUTPUT_TYPE,
            generation_kwargs=None if self.tests.labels else {"until": []},
            num_fewshot=0,
            metadata=dict(given),
        )

    def download(self, *_: Any, **__: Any) -> None:
        """Do nothing: the examples are those of the run."""

    def has_training_docs(self) -> bool:
        """Return False: a run is scored as it was trained."""
        return False

    has_validation_docs = has_training_docs

    def has_test_docs(self) -> bool:
        """Return True: the test examples of the run."""
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        """Return the test examples of the run."""
        return self.tests.documents

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """Return the prompt."""
        return doc["prompt"]

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        """Return the first right answer, as it follows the prompt."""
        return self._space + (doc["gold"] or [""])[0]

    @property
    def _space(self) -> str:
        return self.tests.preprocessor.space

    def fewshot_context(self, doc: Mapping[str, Any], *_: Any, **options: Any) -> str:
        """Return the prompt alone.

        Raises:
            UserError: instructions or a chat template are asked for, which the run has not read.
        """
        if options.get("system_instruction") or options.get("apply_chat_template"):
            raise UserError(
                "system_instruction, apply_chat_template: the run reads its own prompt; leave them "
                "out"
            )
        return doc["prompt"]

    def construct_requests(
        self,
        doc: Mapping[str, Any],
        ctx: str,
        metadata: Any = (None, None, None),
        **_: Any,
    ) -> list[Instance]:
        """Return a request for each label, or one for the answer.

        The id of the document is the last argument, so that a cache of requests (`--use_cache`)
        tells two documents with one prompt apart.

        Raises:
            UserError: options of generation are given.
        """
        if asked := {k: v for k, v in (self.config.generation_kwargs or {}).items() if v}:
            raise UserError(
                f"gen_kwargs={asked}: the run decodes with its own decode options; leave them out"
            )
        if not self.tests.labels:
            return [Instance("generate_until", doc, (ctx, {}, doc["id"]), 0, metadata)]
        return [
            Instance("loglikelihood", doc, (ctx, self._space + label, doc["id"]), i, metadata)
            for i, label in enumerate(self.tests.labels)
        ]

    def process_results(
        self, doc: Mapping[str, Any], results: Sequence[Any]
    ) -> dict[str, tuple[int, str]]:
        """Return metric -> number and prediction of the document; `aggregation` scores them."""
        text = results[0]
        if labels := self.tests.labels:
            likelihoods = [value for value, _ in results]
            text = labels[likelihoods.index(max(likelihoods))]
        return dict.fromkeys(self.tests.metrics, (self.tests.numbers[doc["id"]], text))

    def aggregation(self) -> dict[str, Any]:
        """Return metric -> function of what `process_results` gave for all documents."""
        return {name: functools.partial(self.tests.score, name) for name in self.tests.metrics}

    def higher_is_better(self) -> dict[str, bool]:
        """Return True for every metric."""
        return dict.fromkeys(self.tests.metrics, True)

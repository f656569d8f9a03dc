"""Evaluators as rows of images: brought together from all processes, and results written whole or not at all.

Several run side by side in `Evaluators`, where one that fails takes no other's result with it.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..files import atomic_write

logger = logging.getLogger(__name__)
EXPLAINED = (ValueError, OSError, ImportError)  # errors whose message says it all; others show their trace


class RowEvaluator(DatasetEvaluator):
    """Makes a row of every image, and a result of all rows. A subclass has

    - `row(x, y)`: the row of an input and its output, or None where there is nothing to note;
    - `summary(rows)`: the result of the rows by image id, see `gather_rows`.
    """

    def __init__(self, output_dir: str | None = None):
        self._output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        self._rows = {}

    def process(self, inputs: list[Mapping], outputs: list[Mapping]) -> None:
        for x, y in zip(inputs, outputs):
            row = self.row(x, y)
            if row is not None:
                self._rows[x["image_id"]] = row

    def evaluate(self) -> dict | None:
        """The summary; None on every process but the first."""
        rows = gather_rows(self._rows)
        return None if rows is None else self.summary(rows)

    def write(self, name: str, content) -> None:
        """Writes `output_dir/name` as JSON, replacing it in one step; nothing without an output_dir."""
        write_json(self._output_dir, name, content)


class EvaluationError(ValueError):
    """Some evaluators failed. `results` are those of the others, which have been written."""

    def __init__(self, failures: Mapping[str, str], results: dict):
        told = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        super().__init__(f"{len(failures)} evaluator(s) failed, the results of the others stand above. {told}")
        self.results = results


class Evaluators(DatasetEvaluator):
    """Runs several evaluators. One that fails is left out from then on, on all processes, and the others go on.

    With an output_dir `results.json` holds the results so far, and is written anew after each evaluator.
    `failures` is {class of an evaluator: why it failed}, the same on all processes once `evaluate` is through;
    `errors` are the exceptions of this process.
    """

    def __init__(self, evaluators: Sequence[DatasetEvaluator], output_dir: str | None = None):
        self._evaluators = {type(evaluator).__name__: evaluator for evaluator in evaluators}
        self._output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        self.failures: dict[str, str] = {}
        self.errors: list[Exception] = []
        for evaluator in self._evaluators.values():
            evaluator.reset()

    def process(self, inputs: list[Mapping], outputs: list[Mapping]) -> None:
        for name, evaluator in self._evaluators.items():
            if name not in self.failures:
                with self._contained(name):
                    evaluator.process(inputs, outputs)

    def evaluate(self) -> dict | None:
        """{task: {metric: value}} of the evaluators that did not fail; None on every process but the first."""
        results: dict = {}
        for name, evaluator in self._evaluators.items():
            self._agree(name)  # before what follows waits for all processes
            if name not in self.failures:
                with self._contained(name):
                    results |= evaluator.evaluate() or {}
                    if comm.is_main_process():
                        write_json(self._output_dir, "results.json", without_nan(results))
                self._agree(name)
        return results if comm.is_main_process() else None

    @contextlib.contextmanager
    def _contained(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
            self.errors.append(error)
            logger.error("%s failed and is left out: %s", name, error, exc_info=not isinstance(error, EXPLAINED))

    def _agree(self, name: str) -> None:
        """What failed on one process has failed on all."""
        reasons = [reason for reason in comm.all_gather(self.failures.get(name)) if reason]
        if reasons:
            self.failures[name] = reasons[0]


def write_json(folder: str | None, name: str, content) -> None:
    """Writes `folder/name`, replacing it in one step; nothing where folder is None or empty."""
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(folder) / name, "w") as file:
        json.dump(content, file, indent=1)


def without_nan(content):
    """The same with None in place of NaN, which JSON does not know."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content


def gather_rows(rows: Mapping) -> dict | None:
    """Rows of all processes by image id, in the order of the ids; None on every process but the first.

    Sums over the result are the same, to the last bit, whatever the number of processes. An image that a sampler gave
    to two processes is there once.
    """
    gathered = comm.gather(dict(rows), dst=0)
    if not comm.is_main_process():
        return None
    merged = {image_id: row for part in gathered for image_id, row in part.items()}
    # numbers before texts: ids of both types do not compare
    return {i: merged[i] for i in sorted(merged, key=lambda i: (isinstance(i, str), i))}

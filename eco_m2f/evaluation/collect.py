"""Evaluators that gather a row per image from all processes and write their results in whole files.

`Evaluators` runs several of them. If one fails, the results of the others stay.
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
EXPLAINED = (ValueError, OSError, ImportError)  # the message explains these; other errors are logged with their trace


class RowEvaluator(DatasetEvaluator):
    """Makes an image row of each image, and results of all rows. A subclass has

    - `row(x, y)`: the image row of an input x and its output y, or None to skip the image;
    - `summary(rows)`: the results {task: {metric: value}} of {image id: row}, see `gather_rows`.
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
        """The results; None except on the first process."""
        rows = gather_rows(self._rows)
        return None if rows is None else self.summary(rows)

    def write(self, name: str, content) -> None:
        """Writes `output_dir/name` as JSON, whole or not at all. Does nothing without an output_dir."""
        write_json(self._output_dir, name, content)


class EvaluationError(ValueError):
    """Evaluators failed. `results` are those of the other evaluators, which are already written."""

    def __init__(self, failures: Mapping[str, str], results: dict):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        super().__init__(f"{len(failures)} evaluator(s) failed; the results of the others are above. {reasons}")
        self.results = results


class Evaluators(DatasetEvaluator):
    """Runs several evaluators. One that fails is left out on all processes, and the others continue.

    With an output_dir `results.json` has the results so far; it is written again after each evaluator. `failures` is
    {class of an evaluator: reason}, the same on all processes after `evaluate`. `errors` are the exceptions of this
    process.
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
        """{task: {metric: value}} of the evaluators that did not fail; None except on the first process."""
        results: dict = {}
        for name, evaluator in self._evaluators.items():
            self._agree(name)  # first, because the next call waits for all processes
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
        """Marks an evaluator as failed on all processes if it failed on one."""
        reasons = [reason for reason in comm.all_gather(self.failures.get(name)) if reason]
        if reasons:
            self.failures[name] = reasons[0]


def write_json(folder: str | None, name: str, content) -> None:
    """Writes `folder/name` as JSON, whole or not at all. Does nothing if folder is None or empty."""
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(folder) / name, "w") as file:
        json.dump(content, file, indent=1)


def without_nan(content):
    """A copy with None in place of NaN, which JSON does not have."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content


def gather_rows(rows: Mapping) -> dict | None:
    """{image id: row} of all processes, in the order of the ids; None except on the first process.

    An image that two processes had occurs once. So sums over the rows are the same, to the last bit, for any number of
    processes.
    """
    gathered = comm.gather(dict(rows), dst=0)
    if not comm.is_main_process():
        return None
    merged = {image_id: row for part in gathered for image_id, row in part.items()}
    # integers before strings: they cannot be compared
    return {i: merged[i] for i in sorted(merged, key=lambda i: (isinstance(i, str), i))}

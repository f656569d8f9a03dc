"""Evaluators as rows of images: brought together from all processes, and results written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..files import atomic_write


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
        if not self._output_dir:
            return
        Path(self._output_dir).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(self._output_dir) / name, "w") as file:
            json.dump(content, file, indent=1)


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

"""The exits that images took, and their GFLOPs."""

from collections import Counter
from collections.abc import Mapping

from ..costs import ExitCosts, input_sizes
from .collect import RowEvaluator


class ExitStatistics(RowEvaluator):
    """Reads `exit` (int) of the outputs. A model without exits gives no results.

    `evaluate` returns {"exits": {mean_exit, GFLOPs, encoder_GFLOPs, images@<exit>}}: means over the images, and the
    number of images per exit. GFLOPs follow the paper's convention (`costs/exits.py`). With an output_dir it also
    writes `exits.json` with the exit of each image.
    """

    def __init__(self, costs: ExitCosts, output_dir: str | None = None):
        """costs: those of the model. It must get its images one by one: the costs are for an image padded alone."""
        super().__init__(output_dir)
        self._costs = costs

    def row(self, x: Mapping, y: Mapping) -> tuple[int, float, float] | None:
        if "exit" not in y:
            return None
        gflops = self._costs(*input_sizes(x, self._costs.size_divisibility))[y["exit"]]
        return int(y["exit"]), float(gflops["total"]), float(gflops["encoder"])

    def summary(self, rows: dict) -> dict:
        if not rows:
            return {}
        exits, total, encoder = zip(*rows.values())
        count = Counter(exits)
        result = {
            "mean_exit": sum(exits) / len(rows),
            "GFLOPs": sum(total) / len(rows),
            "encoder_GFLOPs": sum(encoder) / len(rows),
            **{f"images@{k}": count[k] for k in sorted(count)},
        }
        per_image = {str(i): k for i, (k, _, _) in rows.items()}
        self.write("exits.json", {**result, "per_image": per_image})
        return {"exits": result}

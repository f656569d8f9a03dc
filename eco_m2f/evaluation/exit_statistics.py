"""How deep the images went, and what that cost."""

from collections import Counter
from collections.abc import Mapping

from detectron2.evaluation import DatasetEvaluator

from .collect import gather_rows, write_json


class ExitStatistics(DatasetEvaluator):
    """Reads `exit` (int) and `exit_gflops` {"total", "encoder"} of the outputs; a model without exits gives no result.

    `evaluate` returns {"exits": {mean_exit, GFLOPs, encoder_GFLOPs, images@<exit>}}: means over all images in the
    paper's convention (`flops.py`), and the number of images per exit. With an output_dir it also writes `exits.json`
    with every image's exit.
    """

    def __init__(self, output_dir: str | None = None):
        self._output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        self._rows = {}

    def process(self, inputs: list[Mapping], outputs: list[Mapping]) -> None:
        for x, y in zip(inputs, outputs):
            if "exit" in y:
                gflops = y["exit_gflops"]
                self._rows[x["image_id"]] = (int(y["exit"]), float(gflops["total"]), float(gflops["encoder"]))

    def evaluate(self) -> dict | None:
        rows = gather_rows(self._rows)
        if rows is None:
            return None
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
        write_json(self._output_dir, "exits.json", {**result, "per_image": per_image})
        return {"exits": result}

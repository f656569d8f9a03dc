"""How deep the images went, and what that cost."""

from collections import Counter
from collections.abc import Mapping

from .collect import RowEvaluator


class ExitStatistics(RowEvaluator):
    """Reads `exit` (int) and `exit_gflops` {"total", "encoder"} of the outputs; a model without exits gives no result.

    `evaluate` returns {"exits": {mean_exit, GFLOPs, encoder_GFLOPs, images@<exit>}}: means over all images in the
    paper's convention (`flops.py`), and the number of images per exit. With an output_dir it also writes `exits.json`
    with every image's exit.
    """

    def row(self, x: Mapping, y: Mapping) -> tuple[int, float, float] | None:
        if "exit" not in y:
            return None
        return int(y["exit"]), float(y["exit_gflops"]["total"]), float(y["exit_gflops"]["encoder"])

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

"""The tokens that a DoViT kept, and the GFLOPs saved."""

from collections.abc import Mapping

from ..costs import TokenCosts, input_sizes
from .collect import RowEvaluator


class TokenStatistics(RowEvaluator):
    """Reads `tokens` of the outputs of `DoViT.forward`. Another model gives no results.

    `evaluate` returns {"tokens": {threshold, kept@<i>, GFLOPs, static_GFLOPs, saved}}. kept@<i> is the mean share of
    tokens kept after decision point i (from 1). GFLOPs and static_GFLOPs are the mean costs with and without stopping.
    saved is the share of static_GFLOPs that was saved. Shares are in percent. With an output_dir it also writes
    `tokens.json`, with the row of each image.
    """

    def __init__(self, costs: TokenCosts, output_dir: str | None = None):
        super().__init__(output_dir)
        self._costs = costs

    def row(self, x: Mapping, y: Mapping) -> dict | None:
        """The image row {threshold, kept, gflops, static_gflops}. At a threshold of 1 no token stops."""
        if "tokens" not in y:
            return None
        threshold, shares = y["tokens"]["threshold"], y["tokens"]["kept"]
        sizes = input_sizes(x, self._costs.size_divisibility)
        static = gflops = self._costs(*sizes)
        if threshold < 1:
            gflops = self._costs(*sizes, [round(share * self._costs.tokens(sizes[0])) for share in shares])
        return {"threshold": threshold, "kept": shares, "gflops": gflops, "static_gflops": static}

    def summary(self, rows: dict) -> dict:
        if not rows:
            return {}
        gflops, static = (sum(row[key] for row in rows.values()) / len(rows) for key in ("gflops", "static_gflops"))
        kept = [100 * sum(shares) / len(rows) for shares in zip(*(row["kept"] for row in rows.values()))]
        result = {
            "threshold": next(iter(rows.values()))["threshold"],
            **{f"kept@{i}": share for i, share in enumerate(kept, 1)},
            "GFLOPs": gflops,
            "static_GFLOPs": static,
            "saved": 100 * (1 - gflops / static),
        }
        per_image = {str(image_id): row for image_id, row in rows.items()}
        self.write("tokens.json", {**result, "per_image": per_image})
        return {"tokens": result}

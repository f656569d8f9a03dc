"""How many tokens went on, and what that saved."""

from collections.abc import Mapping

from ..costs import TokenCosts, input_sizes
from .collect import RowEvaluator


class TokenStatistics(RowEvaluator):
    """Reads `tokens` of the outputs, as `DoViT.forward` makes them; a model that stops no tokens gives no result.

    `evaluate` returns {"tokens": {threshold, kept@<i>, GFLOPs, static_GFLOPs, saved}}: the mean share of the tokens
    that go on after each decision point i (from 1), the mean costs with and without stopping, and the share of the
    latter that was saved, shares in percent. With an output_dir it also writes `tokens.json`, with every image's own.
    """

    def __init__(self, costs: TokenCosts, output_dir: str | None = None):
        super().__init__(output_dir)
        self._costs = costs

    def row(self, x: Mapping, y: Mapping) -> dict | None:
        """{threshold, kept, gflops, static_gflops} of an image. At a threshold of 1 nothing is decided."""
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

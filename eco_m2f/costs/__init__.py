"""GFLOPs of a model at its exits or with stopped tokens, for images of any size, without running the model."""

from .build import cost_table, costs_of_results
from .exits import ExitCosts, Measurement, exits_of, postprocessing_flops
from .report import analyze, format_report, parameter_counts
from .sizes import at_test_size, input_sizes, padded_size, read_image_sizes
from .table import CONVENTION, CostTable
from .tape import OpTape, module_flops
from .tokens import TokenCosts, TokenTable, read_shares

__all__ = [
    "CONVENTION",
    "CostTable",
    "ExitCosts",
    "Measurement",
    "OpTape",
    "TokenCosts",
    "TokenTable",
    "analyze",
    "at_test_size",
    "cost_table",
    "costs_of_results",
    "exits_of",
    "format_report",
    "input_sizes",
    "module_flops",
    "padded_size",
    "parameter_counts",
    "postprocessing_flops",
    "read_image_sizes",
    "read_shares",
]

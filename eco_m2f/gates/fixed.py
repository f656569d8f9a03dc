"""A fixed exit as a gate, so that a search can save it."""

import dataclasses

import torch

from ..exits import exits_up_to
from .frontier import GateFitter, Row
from .gate import Gate


def with_gate(row: Row, fitter: GateFitter, loss: str) -> Row:
    """The row of a fixed exit, with a gate that sends all images there: weights of 0, and a bias for the exit.

    loss: what the gate's file names; nothing was fitted, and its beta is 0.
    """
    exits, source = exits_up_to(fitter.train.exits, row.max_exit), fitter.train.provenance
    bias = torch.zeros(len(exits))  # [E']
    bias[-1] = 1.0
    gate = Gate(
        weight=torch.zeros(len(exits), fitter.features.shape[1]),  # [E', C]
        bias=bias,
        exits=exits,
        beta=0.0,
        loss=loss,
        feature_source=source["feature_source"],
        parent_sha256=source["parent_sha256"],
        fit={"fixed_exit": row.max_exit},
    )
    about = {"measured_on": fitter.val.provenance["dataset"], "num_images": len(fitter.val)}
    gate.results = {**row.numbers(), **about}
    return dataclasses.replace(row, gate=gate)

"""Every parent with early exits, small."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from detectron2.utils.events import EventStorage
from minis import DETR, ECO, ECO_DETR, LITE, MASKFORMER, PARENT, PROSCALE, build, fill, make_batch

SIZES = ((64, 96), (30, 70))  # the second is padded to the first; half of its tokens are padding for DETR


@dataclass(frozen=True, eq=False)
class System:
    """A parent and its variant with exits: configs, options and exits. If exit k equals a parent of k layers, also the
    config key of the number of layers."""

    parent: str
    eco: str
    opts: tuple = ()
    exits: tuple[int, ...] = (2, 3, 4, 5, 6)
    layers: str = ""

    @property
    def last(self) -> int:
        return self.exits[-1]

    def build_eco(self, *opts, exits: tuple[int, ...] | None = None):
        return build(self.eco, *self.opts, *eco_opts(*(exits or self.exits)), *opts)

    @functools.cache
    def models(self):
        """(parent, variant with exits), with the same weights."""
        eco = fill(self.build_eco())
        parent = build(self.parent, *self.opts)
        parent.load_state_dict(eco.state_dict(), strict=True)
        return parent, eco

    def twin(self, *opts, **exits):
        """Another variant with exits, with the same weights."""
        model = self.build_eco(*opts, **exits)
        model.load_state_dict(self.models()[1].state_dict(), strict=True)
        return model


def eco_opts(*exits: int) -> tuple:
    return (
        *("MODEL.ECO.EXITS", exits, "MODEL.ECO.EXITS_PER_STEP", len(exits)),
        *("MODEL.ECO.EXIT", exits[-1], "MODEL.ECO.MAX_EXIT", exits[-1]),
    )


STAGES = ("MODEL.PROSCALE.STAGES", (1, 1, 1), "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 3)


SYSTEMS = {
    "m2f": System(PARENT, ECO, layers="MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    "lite": System(PARENT, ECO, LITE),
    "proscale, last stage": System(PARENT, ECO, PROSCALE, (5, 6)),
    "proscale, all stages": System(
        PARENT, ECO, (*PROSCALE, *STAGES, "MODEL.PROSCALE.EXIT_AFTER_STAGES", True), (1, 2, 3)
    ),
    "maskformer": System(PARENT, ECO, MASKFORMER, layers="MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    "detr": System(DETR, ECO_DETR, layers="MODEL.DETR.ENC_LAYERS"),
}


each_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)


PARENTS = ("m2f", "maskformer", "detr")


each_parent = pytest.mark.parametrize("system", [SYSTEMS[name] for name in PARENTS], ids=PARENTS)


def same(a: dict, b: dict) -> bool:
    """Whether two results are equal, bit for bit."""
    pairs = [(a["instances"].get(n), b["instances"].get(n)) for n in ("scores", "pred_classes")]
    pairs.append((a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor))
    if "sem_seg" in a:
        pairs += [(a["sem_seg"], b["sem_seg"]), (a["panoptic_seg"][0], b["panoptic_seg"][0])]
        if a["panoptic_seg"][1] != b["panoptic_seg"][1]:
            return False
    return a.keys() - {"exit"} == b.keys() - {"exit"} and all(torch.equal(x, y) for x, y in pairs)


def step(model, double: bool = False) -> tuple[dict, dict]:
    """Losses and gradients of a training step, always with the same random points."""
    model = copy.deepcopy(model).train()
    if double:
        model.double()
    torch.manual_seed(0)
    with EventStorage(0):
        losses = model(make_batch(SIZES))
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_all_close(found: dict, wanted: dict, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=1000 * tolerance)

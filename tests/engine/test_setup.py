"""Configs that cannot be used, and what a config becomes."""

import pytest
import torch
from engine_steps import load
from minis import CONFIGS, ECO

from eco_m2f.engine.setup import build_model, load_cfg


def test_what_does_not_fit_the_config_is_told_with_its_source(tmp_path):
    cases = {
        "MODEL: {NOPE: 1}": "MODEL.NOPE",
        "SOLVER: {BASE_LR: [1, 2]}": "BASE_LR",
        "MODEL: [": "flow",
        "MODEL: {WEIGHTS: !!python/object/apply:os.getcwd []}": "python/object",
        "VERSION: 99": "VERSION is 99",
        "SOLVER: {BASE_LR: .nan}": "SOLVER.BASE_LR is nan",
        'SOLVER: {BASE_LR: "1e999"}': "SOLVER.BASE_LR is inf",
        "SOLVER: {MAX_ITER: .inf}": "SOLVER.MAX_ITER",
        "SOLVER: {MAX_ITER: -5}": "SOLVER.MAX_ITER is -5",
        "MODEL: 3": "MODEL",
        "": "holds nothing",
    }
    for i, (text, message) in enumerate(cases.items()):
        path = tmp_path / f"{i}.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"(?s)config file {path}.*{message}"):
            load_cfg(str(path))
    with pytest.raises(ValueError, match="options.*MODEL.NOPE"):
        load("MODEL.NOPE", "1")
    with pytest.raises(ValueError, match="options.*SOLVER.BASE_LR is inf"):
        load("SOLVER.BASE_LR", "1e999")
    with pytest.raises(ValueError, match="options.*odd length.*MODEL.DEVICE"):
        load_cfg(str(CONFIGS / ECO), ["MODEL.DEVICE"])
    with pytest.raises(FileNotFoundError, match="'no.yaml'.*configs/"):
        load_cfg("no.yaml")


@pytest.mark.parametrize(
    "key",
    [
        "MODEL.META_ARCHITECTURE",
        "MODEL.BACKBONE.NAME",
        "MODEL.SEM_SEG_HEAD.NAME",
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME",
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
        "MODEL.ECO.POLICY",
    ],
)
def test_a_part_that_does_not_exist_is_named(key):
    with pytest.raises(ValueError, match="'Nonesuch' found in '.*' registry"):
        build_model(load(key, "Nonesuch"))


def test_without_a_gpu_the_cpu_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load_cfg(str(CONFIGS / ECO), ["MODEL.DEVICE", "cuda:0", "MODEL.RESNETS.NORM", "SyncBN"])
    assert (cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM) == ("cpu", "BN")

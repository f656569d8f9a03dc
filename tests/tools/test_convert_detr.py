"""tools/convert_detr.py on generated files of the published layout."""

import convert_detr
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from minis import CONFIGS, DETR, ECO_DETR
from torchvision.models import resnet50
from torchvision.ops import FrozenBatchNorm2d

from eco_m2f.checkpoint.checkpointer import Checkpointer
from eco_m2f.engine.setup import load_cfg
from eco_m2f.modeling.detr import DetrHead

SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.DETR.HIDDEN_DIM", 32, "MODEL.DETR.DIM_FEEDFORWARD", 64),
    *("MODEL.DETR.NUM_OBJECT_QUERIES", 5, "MODEL.DETR.ENC_LAYERS", 6, "MODEL.DETR.DEC_LAYERS", 2),
]


def published(classes: int = 91) -> tuple[torch.nn.Module, DetrHead, dict]:
    """A ResNet-50 with random frozen norms, a small head, and their weights under the published names."""
    torch.manual_seed(0)
    backbone = resnet50(norm_layer=FrozenBatchNorm2d).eval()
    for name, buffer in backbone.named_buffers():
        buffer.uniform_(0.8, 1.2) if name.endswith(("weight", "running_var")) else buffer.normal_(0, 0.1)
    head = DetrHead(
        in_channels=2048, num_classes=classes, num_queries=5, dim=32, dec_layers=2, dim_feedforward=64
    ).eval()
    body = {f"backbone.0.body.{n}": v for n, v in backbone.state_dict().items() if not n.startswith("fc.")}
    return backbone, head, body | head.state_dict()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    backbone, head, weights = published()
    path = tmp_path_factory.mktemp("published") / "detr-r50.pth"
    torch.save({"model": weights}, path)
    return path, backbone, head


@torch.no_grad()
def test_the_converted_model_computes_what_the_published_one_does(source, tmp_path, capsys):
    """The backbone equals torchvision's. The classes are COCO's 80 of the 91 numbers, and "no object"."""
    path, backbone, head = source
    convert_detr.main(convert_detr.build_parser().parse_args([str(path), str(tmp_path / "detr.pth")]))
    assert "80 classes" in capsys.readouterr().out
    cfg = load_cfg(str(CONFIGS / DETR), SMALL)
    model = build_model(cfg).eval()
    Checkpointer(model).load_for_evaluation(str(tmp_path / "detr.pth"))
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    layers = torch.nn.Sequential(*list(backbone.double().children())[:-2])  # without pooling and classifier
    wanted = layers(x)
    torch.testing.assert_close(model.backbone.double()(x)["res5"], wanted, atol=1e-9, rtol=1e-9)
    res5 = {"res5": (wanted / wanted.std()).float()}
    ours, theirs = model.head(res5), head(res5)
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    assert len(ids) == 80
    for category, contiguous in ids.items():
        torch.testing.assert_close(ours["pred_logits"][..., contiguous], theirs["pred_logits"][..., category])
    torch.testing.assert_close(ours["pred_logits"][..., 80], theirs["pred_logits"][..., 91])
    torch.testing.assert_close(ours["pred_boxes"], theirs["pred_boxes"])


def test_it_loads_into_the_model_with_exits_too(source, tmp_path):
    convert_detr.convert(source[0], tmp_path / "detr.pth")
    model = build_model(load_cfg(str(CONFIGS / ECO_DETR), SMALL))
    Checkpointer(model).load_for_evaluation(str(tmp_path / "detr.pth"))


def test_other_numbers_of_classes_stay_as_they_are(tmp_path):
    weights = published(classes=6)[2]
    weights["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(3)
    converted = convert_detr.converted_weights(weights)
    assert torch.equal(converted["detr.class_embed.weight"], weights["class_embed.weight"])
    assert len(converted) == len(weights) - 1

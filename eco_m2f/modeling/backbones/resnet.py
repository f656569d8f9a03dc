"""DETR-DC5's ResNet: detectron2's, with a res5 that keeps the stride of res4."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import ResNet, build_resnet_backbone


@BACKBONE_REGISTRY.register()
def build_dc5_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """A ResNet whose res5 has stride 16. All its blocks but the first are dilated by 2, as in torchvision and DETR-DC5.

    detectron2 dilates the first block too; published weights would then give other maps.
    """
    if cfg.MODEL.RESNETS.RES5_DILATION != 2:
        raise ValueError(
            f"build_dc5_resnet_backbone needs MODEL.RESNETS.RES5_DILATION 2, got {cfg.MODEL.RESNETS.RES5_DILATION}: "
            "set it, or take build_resnet_backbone"
        )
    if "res5" not in cfg.MODEL.RESNETS.OUT_FEATURES:
        raise ValueError(
            f"build_dc5_resnet_backbone needs res5 among MODEL.RESNETS.OUT_FEATURES {cfg.MODEL.RESNETS.OUT_FEATURES}: "
            "add it, or take build_resnet_backbone"
        )
    resnet = build_resnet_backbone(cfg, input_shape)
    first = resnet.res5[0].conv2
    first.dilation = first.padding = (1, 1)
    return resnet

"""Every config key of the project and its default.

The parent's keys have their official Mask2Former names, so official YAML files merge unchanged. Keys of this project
are those under MODEL.ECO, MODEL.DETR, MODEL.TIMM, MODEL.PROSCALE, MODEL.HYBRID and MODEL.DOVIT; MASK_BRANCH,
PIXEL_DECODER_AMP and TRANSFORMER_ENCODER_NAME of MODEL.SEM_SEG_HEAD; MASK_LOSS of MODEL.MASK_FORMER;
SOLVER.AMP.PRECISION, SOLVER.IMS_PER_GPU, TEST.AMP, TEST.COMPILE and DATASETS.CUSTOM. Every key is read, except
detectron2's in WITHOUT_EFFECT. tests/test_config.py proves both.
"""

from collections.abc import Iterable, Mapping, Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

# Keys of detectron2 and its DeepLab, and nodes of keys, that have no effect here.
WITHOUT_EFFECT = (
    *("DATALOADER.REPEAT_SQRT", "DATALOADER.REPEAT_THRESHOLD"),
    *("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN"),
    *("DATASETS.PROPOSAL_FILES_TEST", "DATASETS.PROPOSAL_FILES_TRAIN"),
    *("GLOBAL.HACK", "INPUT.MASK_FORMAT", "VIS_PERIOD"),
    *("MODEL.ANCHOR_GENERATOR", "MODEL.KEYPOINT_ON", "MODEL.MASK_ON", "MODEL.PANOPTIC_FPN", "MODEL.PROPOSAL_GENERATOR"),
    *("MODEL.RETINANET", "MODEL.ROI_BOX_CASCADE_HEAD", "MODEL.ROI_BOX_HEAD", "MODEL.ROI_HEADS"),
    *("MODEL.ROI_KEYPOINT_HEAD", "MODEL.ROI_MASK_HEAD", "MODEL.RPN"),
    *("MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS", "MODEL.SEM_SEG_HEAD.ASPP_DROPOUT"),
    *("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", "MODEL.SEM_SEG_HEAD.PROJECT_FEATURES"),
    "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
    *("SOLVER.BIAS_LR_FACTOR", "SOLVER.NESTEROV", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.WEIGHT_DECAY_BIAS"),
    *("TEST.KEYPOINT_OKS_SIGMAS", "TEST.PRECISE_BN"),
)


def set_without_effect(cfg: CfgNode) -> dict[str, object]:
    """{key: value} of the keys without effect that differ from their default."""
    default = get_cfg()
    add_deeplab_config(default)
    ours, nodes = leaves(cfg), tuple(f"{path}." for path in WITHOUT_EFFECT)
    unread = {key: value for key, value in leaves(default).items() if f"{key}.".startswith(nodes)}
    return {key: ours[key] for key, value in unread.items() if ours[key] != value}


REMOVED = {  # keys of earlier versions: the value that did nothing, and the remedy for any other value
    "SOLVER.ACCUMULATION_STEPS": (
        1,
        "multiply SOLVER.IMS_PER_BATCH by it, and set SOLVER.IMS_PER_GPU to the images that a GPU takes at once",
    ),
    "MODEL.ECO.ALPHA_LIST": ([], "give MODEL.ECO.ALPHA the list itself"),
}


def merge_settings(cfg: CfgNode, settings: dict) -> None:
    """Merges the settings of a config file. Raises ValueError for a removed key unless its value did nothing."""
    settings = without_idle(settings)
    _refuse_removed(leaves(settings))
    _open_alpha(cfg, leaves(settings))
    cfg.merge_from_other_cfg(CfgNode(settings))


def merge_options(cfg: CfgNode, opts: Sequence) -> None:
    """Merges [key, value, key, value, ...]. Raises ValueError for a removed key."""
    _refuse_removed(opts[::2])
    _open_alpha(cfg, opts[::2])
    cfg.merge_from_list(list(opts))


def without_idle(settings: Mapping, prefix: str = "") -> dict:
    """A copy without removed keys at the value that did nothing. The configs of earlier runs have them."""
    kept = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if path not in REMOVED or value != REMOVED[path][0]:
            kept[key] = without_idle(value, f"{path}.") if isinstance(value, Mapping) else value
    return kept


def _refuse_removed(keys: Iterable[str]) -> None:
    for key in keys:
        if key in REMOVED:
            raise ValueError(f"the key {key} was removed: {REMOVED[key][1]}")


def _open_alpha(cfg: CfgNode, keys: Iterable[str]) -> None:
    """Lets ALPHA be text or a list. yacs keeps the type of a key, unless its value is None."""
    if "MODEL.ECO.ALPHA" in keys:
        cfg.MODEL.ECO.ALPHA = None


def leaves(cfg: Mapping, prefix: str = "") -> dict[str, object]:
    """{dotted key: value} of a config, which is a CfgNode or plain YAML."""
    found: dict[str, object] = {}
    for key, value in cfg.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def add_eco_config(cfg: CfgNode) -> None:
    """Adds the keys of Mask2Former and of ECO-M2F to a detectron2 config, in place."""
    add_deeplab_config(cfg)  # WarmupPolyLR's keys, RESNETS.RES5_MULTI_GRID, INPUT.CROP.SINGLE_CATEGORY_MAX_AREA
    _add_input(cfg)
    _add_solver(cfg)
    _add_mask_former(cfg)
    _add_pixel_decoder(cfg)
    _add_encoders(cfg)
    _add_detr(cfg)
    _add_swin(cfg)
    _add_timm(cfg)
    _add_dovit(cfg)
    _add_eco(cfg)


def _add_input(cfg: CfgNode) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"  # the training mapper, one of data/mappers.py
    cfg.INPUT.COLOR_AUG_SSD = False  # distort colours in training
    cfg.INPUT.SIZE_DIVISIBILITY = -1  # pad training images to multiples of this size in pixels; -1: do not pad
    cfg.INPUT.IMAGE_SIZE = 1024  # side of the square crop of large-scale jittering, pixels
    cfg.INPUT.MIN_SCALE = 0.1  # least scale of large-scale jittering, relative to IMAGE_SIZE
    cfg.INPUT.MAX_SCALE = 2.0  # largest scale of large-scale jittering
    # Datasets in COCO-panoptic format, registered without code: "name=..,images=..,panoptic=..,json=..", or a mapping.
    # Relative paths start at $DETECTRON2_DATASETS (./datasets if unset); see datasets/README.md.
    cfg.DATASETS.CUSTOM = []


def _add_solver(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "ADAMW"  # or "SGD"
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0  # weight decay of embeddings
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1  # the backbone's learning rate relative to BASE_LR
    # IMS_PER_BATCH is the number of images per optimizer step, for any number of GPUs. A GPU takes IMS_PER_GPU images
    # at once and accumulates gradients over its share of the batch. 0: it takes the whole share at once.
    cfg.SOLVER.IMS_PER_GPU = 0
    cfg.SOLVER.AMP.PRECISION = "float16"  # or "bfloat16"; of training with SOLVER.AMP.ENABLED, and of TEST.AMP
    cfg.TEST.AMP = False  # mixed precision in evaluation and prediction
    cfg.TEST.COMPILE = False  # load_predictor compiles the model for each size of image; for bfloat16 on a CPU


def _add_mask_former(cfg: CfgNode) -> None:
    """Mask2Former's transformer decoder, losses and post-processing."""
    m = cfg.MODEL.MASK_FORMER = CfgNode()
    m.DEEP_SUPERVISION = True  # losses after every decoder layer, not only after the last
    m.NO_OBJECT_WEIGHT = 0.1  # of the class "no object" in the class loss
    m.CLASS_WEIGHT = 1.0  # of the class loss
    m.DICE_WEIGHT = 1.0  # of the dice loss
    m.MASK_WEIGHT = 20.0  # of the mask loss
    m.MASK_LOSS = "cross_entropy"  # Mask2Former's, at random points; or "focal", at all pixels of the prediction
    m.NHEADS = 8  # attention heads
    m.DROPOUT = 0.1
    m.DIM_FEEDFORWARD = 2048  # hidden width of the decoder's feed-forward layers
    m.ENC_LAYERS = 0  # must be 0: the encoder is in the pixel decoder
    m.DEC_LAYERS = 6  # decoder layers; Mask2Former's decoder also counts the prediction from the bare queries
    m.PRE_NORM = False  # norms before the attention and feed-forward layers, not after them
    m.HIDDEN_DIM = 256  # width of the queries
    m.NUM_OBJECT_QUERIES = 100
    m.TRANSFORMER_IN_FEATURE = "res5"  # must be the `in_feature` of the decoder
    m.ENFORCE_INPUT_PROJ = False  # project the decoder's input even if its width is HIDDEN_DIM
    m.SIZE_DIVISIBILITY = 32  # pad batches to multiples of this size in pixels
    m.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    m.TRAIN_NUM_POINTS = 112 * 112  # points per mask in matching and mask losses
    m.OVERSAMPLE_RATIO = 3.0  # candidate points drawn, relative to TRAIN_NUM_POINTS
    m.IMPORTANCE_SAMPLE_RATIO = 0.75  # share of the points that are the most uncertain candidates
    m.TEST = CfgNode()
    m.TEST.SEMANTIC_ON = True
    m.TEST.INSTANCE_ON = False
    m.TEST.PANOPTIC_ON = False
    m.TEST.OBJECT_MASK_THRESHOLD = 0.0  # panoptic: drop queries of a lower class score
    m.TEST.OVERLAP_THRESHOLD = 0.0  # panoptic: drop segments with a smaller visible share of their mask
    m.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False  # semantic: resize masks before classes are added up


def _add_pixel_decoder(cfg: CfgNode) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    head.MASK_DIM = 256  # channels of the mask features
    head.PIXEL_DECODER_NAME = "BasePixelDecoder"
    head.PIXEL_DECODER_AMP = False  # mixed precision in the pixel decoder, off in Mask2Former; for bfloat16
    head.MASK_BRANCH = "fpn"  # makes the mask features: "fpn", "lpe" (PRO-SCALE) or "stride8" (RT-M2F)
    head.TRANSFORMER_ENCODER_NAME = "MSDeformEncoder"  # or another encoder of modeling/encoders/
    head.TRANSFORMER_ENC_LAYERS = 0  # encoder layers
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]  # maps that enter the encoder
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4  # sampling points per head and level
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8


def _add_encoders(cfg: CfgNode) -> None:
    p = cfg.MODEL.PROSCALE = CfgNode()  # ProScaleEncoder
    p.STAGES = [2, 2, 2]  # layers on res5, then with res4, then with res3; their sum is TRANSFORMER_ENC_LAYERS
    p.RECALIBRATE = (
        True  # multiply the tokens that join a stage by sigmoid(TEMPERATURE * score), the score read from res3
    )
    p.TEMPERATURE = 0.1
    p.EXIT_AFTER_STAGES = False  # exits after every stage, and not only after the layers of the last stage
    h = cfg.MODEL.HYBRID = CfgNode()  # HybridEncoder
    h.NORM = "BN"  # or "SyncBN"


def _add_detr(cfg: CfgNode) -> None:
    """Detr and EcoDetr. Their number of classes is MODEL.SEM_SEG_HEAD.NUM_CLASSES, as in every model."""
    d = cfg.MODEL.DETR = CfgNode()
    d.HIDDEN_DIM = 256  # width of tokens and queries
    d.NHEADS = 8  # attention heads
    d.ENC_LAYERS = 6
    d.DEC_LAYERS = 6
    d.DIM_FEEDFORWARD = 2048  # hidden width of the feed-forward layers
    d.DROPOUT = 0.1
    d.NUM_OBJECT_QUERIES = 100
    d.CLASS_WEIGHT = 1.0  # of the class loss
    d.L1_WEIGHT = 5.0  # of the L1 loss of boxes
    d.GIOU_WEIGHT = 2.0  # of the generalised IoU loss of boxes
    d.NO_OBJECT_WEIGHT = 0.1  # of the class "no object" in the class loss
    d.DEEP_SUPERVISION = True  # losses after every decoder layer, not only after the last


def _add_swin(cfg: CfgNode) -> None:
    """Swin, see modeling/backbones/swin.py."""
    s = cfg.MODEL.SWIN = CfgNode()
    s.PRETRAIN_IMG_SIZE = 224  # side of the images that the position embedding of APE is for, pixels
    s.PATCH_SIZE = 4  # pixels
    s.EMBED_DIM = 96  # channels of res2
    s.DEPTHS = [2, 2, 6, 2]  # blocks per stage
    s.NUM_HEADS = [3, 6, 12, 24]  # attention heads per stage
    s.WINDOW_SIZE = 7  # side of the attention windows, tokens
    s.MLP_RATIO = 4.0  # hidden width of the feed-forward layers, relative to their input
    s.QKV_BIAS = True
    s.QK_SCALE = None  # scale of the attention scores; None: 1 / sqrt(channels per head)
    s.DROP_RATE = 0.0
    s.ATTN_DROP_RATE = 0.0
    s.DROP_PATH_RATE = 0.3  # stochastic depth of the last block; earlier blocks have less
    s.APE = False  # add an absolute position embedding
    s.PATCH_NORM = True  # a norm after the patch embedding
    s.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    s.USE_CHECKPOINT = False  # compute activations again in the backward pass, which saves memory


def _add_timm(cfg: CfgNode) -> None:
    """Backbones of the package timm."""
    t = cfg.MODEL.TIMM = CfgNode()
    t.NAME = "resnet50"  # timm's name of the model
    t.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    t.OUTPUT_STRIDE = 32  # of res5; 16: dilated, if the model can be
    t.FREEZE_BN = True  # batch normalisation keeps the statistics and scales of MODEL.WEIGHTS


def _add_dovit(cfg: CfgNode) -> None:
    """DoViT. The defaults are ViT-B's."""
    d = cfg.MODEL.DOVIT = CfgNode()
    d.PATCH_SIZE = 16  # pixels
    d.EMBED_DIM = 768  # width of the tokens
    d.DEPTH = 12  # layers
    d.NUM_HEADS = 12  # attention heads
    d.PRETRAIN_IMG_SIZE = 384  # side of the images that the position embedding of MODEL.WEIGHTS is for, pixels
    d.DECISION_LAYERS = [2, 5, 8]  # number of layers before each decision point
    d.THRESHOLD = 0.985  # a token stops if the score of its class is above this; 1.0: no token stops
    d.HEAD_DIM = 256  # hidden width of the auxiliary heads and of NaiveHead
    d.NORM = "SyncBN"  # norm of the same heads, by detectron2's names
    d.MASK_LAYERS = 2  # layers of MaskTransformerHead
    d.AUX_WEIGHT = 0.4  # of the loss of each auxiliary head
    d.TEACHER = ""  # distillation: weights of the same model trained with THRESHOLD 1.0
    d.KL_WEIGHT = 1.0  # of the distillation loss of classes
    d.FEATURE_WEIGHT = 0.5  # of the distillation loss of features


def _add_eco(cfg: CfgNode) -> None:
    e = cfg.MODEL.ECO = CfgNode()
    e.EXITS = [2, 3, 4, 5, 6]  # numbers of encoder layers after which an image may leave
    # Step A
    # Exit weights of Eq. 3: "linear" (k / K), "uniform" (the paper's USD), or a list, increasing, one weight per exit.
    e.ALPHA = "linear"
    e.EXITS_PER_STEP = 5  # exits trained per iteration; with all exits it is exactly Eq. 3
    e.RECOMPUTE = True  # decode exits again in the backward pass: about the memory of one exit, but more time
    e.SEED = 0  # of the exits drawn if EXITS_PER_STEP is below the number of exits
    # Step B
    e.QUALITY = "PanopticQuality"  # of an image at an exit; or "MeanIoU", "MaskAP", "BoxAP" (DETR); see quality/
    # Inference
    e.POLICY = "FixedExit"  # or "LinearGate" (learned), "OracleExit" (upper bound), "StateChangeExit"; see policies/
    e.EXIT = 6  # FixedExit: the exit of every image
    e.GATE = ""  # LinearGate: a file of tools/train_gate.py
    e.FEATURE = "res5"  # the map that the gate reads: the backbone's "res5", or "projected" (after input_proj)
    e.MAX_EXIT = 6  # K, the deepest exit allowed, of LinearGate, OracleExit, StateChangeExit and Step C
    e.CHANGE_THRESHOLD = 0.1  # StateChangeExit: an image leaves once the relative change of its tokens is below this
    e.BETA = 0.0005  # the price of a layer in quality, of OracleExit and Step C
    e.DERIVED = ""  # OracleExit: folder of the derived dataset
    # Step C, tools/train_gate.py --config-file
    e.LOSS = "hard_ce"  # the gate loss: "hard_ce" (the paper's), "u_ce", "soft_ce" or "soft_mse"
    s = e.GATE_SOLVER = CfgNode()
    s.OPTIMIZER = "lbfgs"  # runs to the optimum; or "adam", the paper's, which the ADAM keys are for
    s.ADAM_LR = 0.003  # learning rate, which falls to 0 along a cosine
    s.ADAM_BATCH = 256  # images per step
    s.ADAM_EPOCHS = 0  # passes over the derived dataset
    s.ADAM_ITERATIONS = 0  # steps, instead of ADAM_EPOCHS. With both 0: 10 epochs, and at least 300 steps

"""Every config key of the project and its default.

The keys of the parent carry their official Mask2Former names, so that official YAML files merge unchanged. Keys of
this project are those under MODEL.ECO, MODEL.DETR, MODEL.TIMM, MODEL.PROSCALE, MODEL.HYBRID and MODEL.DOVIT;
MASK_BRANCH, PIXEL_DECODER_AMP and TRANSFORMER_ENCODER_NAME of MODEL.SEM_SEG_HEAD; MASK_LOSS of MODEL.MASK_FORMER;
SOLVER.AMP.PRECISION, SOLVER.IMS_PER_GPU, TEST.AMP, TEST.COMPILE and DATASETS.CUSTOM. Each key is read somewhere;
of detectron2's, those of WITHOUT_EFFECT are not. tests/test_config.py proves both.
"""

from collections.abc import Iterable, Mapping, Sequence

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config

# Keys of detectron2 and its DeepLab, and nodes of keys, that nothing here reads, or only to leave them alone.
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


def set_in_vain(cfg: CfgNode) -> dict[str, object]:
    """{key: value} of the keys without effect that are not at their default."""
    default = get_cfg()
    add_deeplab_config(default)
    ours, nodes = leaves(cfg), tuple(f"{path}." for path in WITHOUT_EFFECT)
    unread = {key: value for key, value in leaves(default).items() if f"{key}.".startswith(nodes)}
    return {key: ours[key] for key, value in unread.items() if ours[key] != value}


REMOVED = {  # keys of earlier versions: the value that did nothing, and what to do in place of another
    "SOLVER.ACCUMULATION_STEPS": (
        1,
        "multiply SOLVER.IMS_PER_BATCH by it, and set SOLVER.IMS_PER_GPU to the images that a GPU takes at once",
    ),
    "MODEL.ECO.ALPHA_LIST": ([], "give MODEL.ECO.ALPHA the list itself"),
}


def merge_settings(cfg: CfgNode, settings: dict) -> None:
    """Merges what a config file holds. Raises ValueError for a removed key that did something."""
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
    """A copy without the removed keys that did nothing, which the config of every earlier run has."""
    kept = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        if path not in REMOVED or value != REMOVED[path][0]:
            kept[key] = without_idle(value, f"{path}.") if isinstance(value, Mapping) else value
    return kept


def _refuse_removed(keys: Iterable[str]) -> None:
    for key in keys:
        if key in REMOVED:
            raise ValueError(f"there is no key {key} any more: {REMOVED[key][1]}")


def _open_alpha(cfg: CfgNode, keys: Iterable[str]) -> None:
    """Lets ALPHA be a text or a list, where yacs holds a key to the type that it has."""
    if "MODEL.ECO.ALPHA" in keys:
        cfg.MODEL.ECO.ALPHA = None  # which may become a value of any type


def leaves(cfg: Mapping, prefix: str = "") -> dict[str, object]:
    """{dotted key: value} of a config, as a CfgNode or as the YAML that it is written as."""
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
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    cfg.INPUT.IMAGE_SIZE = 1024  # side of the square crop of large-scale jittering, pixels
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0
    # Datasets in COCO-panoptic format, registered without code: "name=..,images=..,panoptic=..,json=..", or a mapping.
    # Relative paths lie under $DETECTRON2_DATASETS (./datasets if unset); see datasets/README.md.
    cfg.DATASETS.CUSTOM = []


def _add_solver(cfg: CfgNode) -> None:
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # IMS_PER_BATCH is what an optimizer step sees in all, with any number of GPUs. A GPU takes IMS_PER_GPU of them at
    # once and accumulates gradients over its share; 0: the whole share at once.
    cfg.SOLVER.IMS_PER_GPU = 0
    cfg.SOLVER.AMP.PRECISION = "float16"  # or "bfloat16"; of training where SOLVER.AMP.ENABLED, of evaluation where..
    cfg.TEST.AMP = False  # ..this is set
    cfg.TEST.COMPILE = False  # load_predictor compiles the model for each size of image; for bfloat16 on a CPU


def _add_mask_former(cfg: CfgNode) -> None:
    m = cfg.MODEL.MASK_FORMER = CfgNode()
    m.DEEP_SUPERVISION = True
    m.NO_OBJECT_WEIGHT = 0.1
    m.CLASS_WEIGHT = 1.0
    m.DICE_WEIGHT = 1.0
    m.MASK_WEIGHT = 20.0
    m.MASK_LOSS = "cross_entropy"  # at random points, Mask2Former's; or "focal", at all pixels of the prediction
    m.NHEADS = 8
    m.DROPOUT = 0.1
    m.DIM_FEEDFORWARD = 2048
    m.ENC_LAYERS = 0
    m.DEC_LAYERS = 6
    m.PRE_NORM = False
    m.HIDDEN_DIM = 256
    m.NUM_OBJECT_QUERIES = 100
    m.TRANSFORMER_IN_FEATURE = "res5"
    m.ENFORCE_INPUT_PROJ = False
    m.SIZE_DIVISIBILITY = 32
    m.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    m.TRAIN_NUM_POINTS = 112 * 112
    m.OVERSAMPLE_RATIO = 3.0
    m.IMPORTANCE_SAMPLE_RATIO = 0.75
    m.TEST = CfgNode()
    m.TEST.SEMANTIC_ON = True
    m.TEST.INSTANCE_ON = False
    m.TEST.PANOPTIC_ON = False
    m.TEST.OBJECT_MASK_THRESHOLD = 0.0
    m.TEST.OVERLAP_THRESHOLD = 0.0
    m.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False


def _add_pixel_decoder(cfg: CfgNode) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    head.MASK_DIM = 256
    head.PIXEL_DECODER_NAME = "BasePixelDecoder"
    head.PIXEL_DECODER_AMP = False  # let autocast into the pixel decoder; Mask2Former does not. For bfloat16
    head.MASK_BRANCH = "fpn"  # what makes the mask features: "fpn", "lpe" (PRO-SCALE) or "stride8" (RT-M2F)
    head.TRANSFORMER_ENCODER_NAME = "MSDeformEncoder"  # or "LiteEncoder", "ProScaleEncoder", ..; see encoders/
    head.TRANSFORMER_ENC_LAYERS = 0
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8


def _add_encoders(cfg: CfgNode) -> None:
    p = cfg.MODEL.PROSCALE = CfgNode()  # ProScaleEncoder
    p.STAGES = [2, 2, 2]  # (p1, p2, p3): layers on res5, then with res4, then with res3; TRANSFORMER_ENC_LAYERS in all
    p.RECALIBRATE = True  # weigh the tokens that join a stage by what res3 says of them
    p.TEMPERATURE = 0.1  # of that
    p.EXIT_AFTER_STAGES = False  # exits after every stage, not only after the layers of the last
    h = cfg.MODEL.HYBRID = CfgNode()  # HybridEncoder
    h.NORM = "BN"  # or "SyncBN"


def _add_detr(cfg: CfgNode) -> None:
    """What Detr and EcoDetr read; their number of classes is MODEL.SEM_SEG_HEAD.NUM_CLASSES, as every model's."""
    d = cfg.MODEL.DETR = CfgNode()
    d.HIDDEN_DIM = 256
    d.NHEADS = 8
    d.ENC_LAYERS = 6
    d.DEC_LAYERS = 6
    d.DIM_FEEDFORWARD = 2048
    d.DROPOUT = 0.1
    d.NUM_OBJECT_QUERIES = 100
    d.CLASS_WEIGHT = 1.0
    d.L1_WEIGHT = 5.0
    d.GIOU_WEIGHT = 2.0
    d.NO_OBJECT_WEIGHT = 0.1
    d.DEEP_SUPERVISION = True  # losses after every decoder layer, not after the last alone


def _add_swin(cfg: CfgNode) -> None:
    s = cfg.MODEL.SWIN = CfgNode()
    s.PRETRAIN_IMG_SIZE = 224
    s.PATCH_SIZE = 4
    s.EMBED_DIM = 96
    s.DEPTHS = [2, 2, 6, 2]
    s.NUM_HEADS = [3, 6, 12, 24]
    s.WINDOW_SIZE = 7
    s.MLP_RATIO = 4.0
    s.QKV_BIAS = True
    s.QK_SCALE = None
    s.DROP_RATE = 0.0
    s.ATTN_DROP_RATE = 0.0
    s.DROP_PATH_RATE = 0.3
    s.APE = False
    s.PATCH_NORM = True
    s.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    s.USE_CHECKPOINT = False


def _add_timm(cfg: CfgNode) -> None:
    t = cfg.MODEL.TIMM = CfgNode()
    t.NAME = "resnet50"  # a model of the package timm
    t.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    t.OUTPUT_STRIDE = 32  # of res5; 16: dilated, where the model can be
    t.FREEZE_BN = True  # batch normalisation keeps the statistics and the scales of MODEL.WEIGHTS


def _add_dovit(cfg: CfgNode) -> None:
    d = cfg.MODEL.DOVIT = CfgNode()  # as it is, ViT-B
    d.PATCH_SIZE = 16
    d.EMBED_DIM = 768
    d.DEPTH = 12
    d.NUM_HEADS = 12
    d.PRETRAIN_IMG_SIZE = 384  # side of the images that the position code of MODEL.WEIGHTS is made for
    d.DECISION_LAYERS = [2, 5, 8]  # how many layers have run at each decision point
    d.THRESHOLD = 0.985  # a token surer than this of its class stops; 1.0: none does
    d.HEAD_DIM = 256  # hidden width of the auxiliary heads and of NaiveHead
    d.NORM = "SyncBN"  # of the same
    d.MASK_LAYERS = 2  # of MaskTransformerHead
    d.AUX_WEIGHT = 0.4  # of the loss of each auxiliary head
    d.TEACHER = ""  # weights of the same model trained at THRESHOLD 1.0, to distil from in training
    d.KL_WEIGHT = 1.0
    d.FEATURE_WEIGHT = 0.5


def _add_eco(cfg: CfgNode) -> None:
    e = cfg.MODEL.ECO = CfgNode()
    e.EXITS = [2, 3, 4, 5, 6]  # encoder layers after which an image may leave
    # Step A
    # Exit weights of Eq. 3: "linear" (k / K), "uniform" (the paper's USD) or a list, one weight per exit, increasing.
    e.ALPHA = "linear"
    e.EXITS_PER_STEP = 5  # exits trained per iteration; all of them is Eq. 3 exactly
    e.RECOMPUTE = True  # decode exits again in the backward pass: the memory of one exit, for more time
    e.SEED = 0  # of the exit draw when EXITS_PER_STEP < len(EXITS)
    # Step B
    e.QUALITY = "PanopticQuality"  # of an image at an exit; or "MeanIoU", "MaskAP", "BoxAP" (DETR); see quality/
    # inference
    e.POLICY = "FixedExit"  # "FixedExit", "LinearGate" (learned), "OracleExit" (upper bound) or "StateChangeExit"
    e.EXIT = 6  # FixedExit: where every image leaves
    e.GATE = ""  # LinearGate: the file that tools/train_gate.py wrote
    e.FEATURE = "res5"  # what the gate reads: the backbone's "res5", or "projected" (after input_proj)
    e.MAX_EXIT = 6  # K, the deepest exit allowed: of LinearGate, OracleExit, StateChangeExit and Step C
    e.CHANGE_THRESHOLD = 0.1  # StateChangeExit: an image leaves once its tokens change by less, relative to themselves
    e.BETA = 0.0005  # price of a layer, in quality: of OracleExit and Step C
    e.DERIVED = ""  # OracleExit: folder of the derived dataset
    # Step C, tools/train_gate.py --config-file
    e.LOSS = "hard_ce"  # of the gate: "hard_ce" (the paper's), "u_ce", "soft_ce" or "soft_mse"
    s = e.GATE_SOLVER = CfgNode()
    s.OPTIMIZER = "lbfgs"  # to the optimum; or "adam", the paper's, which reads the rest:
    s.ADAM_LR = 0.003  # falls to 0 along a cosine
    s.ADAM_BATCH = 256  # images a step
    s.ADAM_EPOCHS = 0  # passes over the derived dataset; or..
    s.ADAM_ITERATIONS = 0  # ..steps. With neither: 10 epochs, and 300 steps at least

"""Keys of Mask2Former and detectron2: their defaults, and those without effect."""

import yaml
from config_files import own_keys

from eco_m2f.config import leaves
from eco_m2f.engine.setup import load_cfg

# Every key of the official panoptic YAML files and of their defaults, with values other than this project's defaults.
OFFICIAL = """
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  WEIGHTS: "model_final_94dc52.pkl"
  PIXEL_MEAN: [123.0, 116.0, 103.0]
  PIXEL_STD: [58.0, 57.0, 56.0]
  BACKBONE: {FREEZE_AT: 0, NAME: "D2SwinTransformer"}
  RESNETS:
    DEPTH: 101
    STEM_TYPE: "basic"
    STEM_OUT_CHANNELS: 32
    STRIDE_IN_1X1: False
    NORM: "BN"
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
    RES5_MULTI_GRID: [1, 1, 2]
  SWIN:
    PRETRAIN_IMG_SIZE: 384
    PATCH_SIZE: 2
    EMBED_DIM: 128
    DEPTHS: [2, 2, 18, 2]
    NUM_HEADS: [4, 8, 16, 32]
    WINDOW_SIZE: 12
    MLP_RATIO: 3.0
    QKV_BIAS: False
    QK_SCALE: null
    DROP_RATE: 0.1
    ATTN_DROP_RATE: 0.1
    DROP_PATH_RATE: 0.2
    APE: True
    PATCH_NORM: False
    OUT_FEATURES: ["res3", "res4", "res5"]
    USE_CHECKPOINT: True
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    IN_FEATURES: ["res2", "res3", "res4"]
    IGNORE_VALUE: 254
    NUM_CLASSES: 133
    LOSS_WEIGHT: 2.0
    CONVS_DIM: 128
    MASK_DIM: 128
    NORM: "BN"
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    COMMON_STRIDE: 8
    TRANSFORMER_ENC_LAYERS: 6
    DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: ["res4", "res5"]
    DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS: 3
    DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS: 4
  MASK_FORMER:
    TRANSFORMER_DECODER_NAME: "StandardTransformerDecoder"
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    DEEP_SUPERVISION: False
    NO_OBJECT_WEIGHT: 0.2
    CLASS_WEIGHT: 2.0
    MASK_WEIGHT: 5.0
    DICE_WEIGHT: 5.0
    HIDDEN_DIM: 128
    NUM_OBJECT_QUERIES: 200
    NHEADS: 4
    DROPOUT: 0.0
    DIM_FEEDFORWARD: 1024
    ENC_LAYERS: 1
    PRE_NORM: True
    ENFORCE_INPUT_PROJ: True
    SIZE_DIVISIBILITY: 64
    DEC_LAYERS: 10
    TRAIN_NUM_POINTS: 1000
    OVERSAMPLE_RATIO: 2.0
    IMPORTANCE_SAMPLE_RATIO: 0.5
    TEST:
      SEMANTIC_ON: False
      INSTANCE_ON: True
      PANOPTIC_ON: True
      OVERLAP_THRESHOLD: 0.8
      OBJECT_MASK_THRESHOLD: 0.8
      SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE: True
DATASETS:
  TRAIN: ["coco_2017_train_panoptic"]
  TEST: ["coco_2017_val_panoptic_with_sem_seg"]
SOLVER:
  IMS_PER_BATCH: 8
  BASE_LR: 0.0002
  STEPS: [327778, 355092]
  MAX_ITER: 368750
  LR_SCHEDULER_NAME: "WarmupPolyLR"
  POLY_LR_POWER: 0.8
  POLY_LR_CONSTANT_ENDING: 0.1
  WARMUP_FACTOR: 1.0
  WARMUP_ITERS: 10
  WEIGHT_DECAY: 0.05
  WEIGHT_DECAY_NORM: 0.01
  WEIGHT_DECAY_EMBED: 0.1
  OPTIMIZER: "SGD"
  BACKBONE_MULTIPLIER: 0.2
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.01, NORM_TYPE: 2.0}
  AMP: {ENABLED: True}
INPUT:
  DATASET_MAPPER_NAME: "coco_panoptic_lsj"
  IMAGE_SIZE: 512
  MIN_SCALE: 0.2
  MAX_SCALE: 1.5
  FORMAT: "RGB"
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: 32
  MIN_SIZE_TRAIN: [512, 1024]
  MIN_SIZE_TRAIN_SAMPLING: "choice"
  MIN_SIZE_TEST: 1024
  MAX_SIZE_TRAIN: 4096
  MAX_SIZE_TEST: 2048
  CROP: {ENABLED: True, TYPE: "absolute", SIZE: [512, 1024], SINGLE_CATEGORY_MAX_AREA: 0.5}
TEST: {EVAL_PERIOD: 5000, DETECTIONS_PER_IMAGE: 50}
DATALOADER: {FILTER_EMPTY_ANNOTATIONS: True, NUM_WORKERS: 4}
VERSION: 2
"""


def test_official_keys_merge_and_keep_their_values(tmp_path):
    path = tmp_path / "official.yaml"
    path.write_text(OFFICIAL)
    # SyncBN and CUDA fall back on a machine without a GPU; nothing else may change on loading
    loaded = leaves(load_cfg(str(path), ["MODEL.DEVICE", "cpu"]))
    for key, value in leaves(yaml.safe_load(OFFICIAL)).items():
        assert list(loaded[key]) == value if isinstance(value, list) else loaded[key] == value, key


OWN_PARTS = ("MODEL.ECO.", "MODEL.TIMM.", "MODEL.PROSCALE.", "MODEL.HYBRID.", "MODEL.DOVIT.", "MODEL.DETR.")


def test_official_keys_are_all_in_that_file():
    """The keys that are not in the official list are this project's own."""
    assert own_keys() - set(leaves(yaml.safe_load(OFFICIAL))) == {
        "DATASETS.CUSTOM",
        "MODEL.MASK_FORMER.MASK_LOSS",
        "MODEL.SEM_SEG_HEAD.MASK_BRANCH",
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_AMP",
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENCODER_NAME",
        "SOLVER.IMS_PER_GPU",
        "SOLVER.AMP.PRECISION",
        "TEST.AMP",
        "TEST.COMPILE",
        *(key for key in own_keys() if key.startswith(OWN_PARTS)),
    }

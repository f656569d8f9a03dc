"""Evaluation of a model on every dataset of DATASETS.TEST."""

import logging
import os

from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn

from ..costs import ExitCosts, TokenCosts, costs_of_results
from ..evaluation.build import evaluators_for
from ..evaluation.collect import EvaluationError, Evaluators
from ..evaluation.multi_scale import MultiScale
from .datasets import build_test_loader, check_datasets, check_model_classes, check_policy
from .optimizer import autocast

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, model: nn.Module) -> dict:
    """Accuracy, and what exits or stopping tokens saved, on every DATASETS.TEST; empty on ranks but the first.

    With TEST.AUG.ENABLED also mIoU over several views of each image, as `sem_seg_TTA`, see `MultiScale`.

    Raises ValueError where DATASETS.TEST is empty, or a dataset does not go with the model; EvaluationError, once all
    others are through and printed, where evaluators failed.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name a dataset to evaluate on")
    check_datasets(cfg, cfg.DATASETS.TEST)
    judged = {"": model}
    if cfg.TEST.AUG.ENABLED:
        judged["_TTA"] = MultiScale.from_config(cfg, model)
    results, failures, errors = {}, {}, []
    costs = costs_of_results(model)
    for name in cfg.DATASETS.TEST:
        check_model_classes(model, name)
        check_policy(model, name)
        results[name] = {}
        for suffix, part in judged.items():
            evaluators = _evaluators(cfg, name, costs, semantic_alone=bool(suffix))
            with autocast(cfg, model.device.type, cfg.TEST.AMP):
                found = inference_on_dataset(part, build_test_loader(cfg, name), evaluators) or {}
            results[name] |= {f"{task}{suffix}": values for task, values in found.items()}
            failures |= {f"{kind} on {name}": reason for kind, reason in evaluators.failures.items()}
            errors += evaluators.errors
        if comm.is_main_process():
            logger.info("results on %s:", name)
            print_csv_format(results[name])
    told = next(iter(results.values())) if len(results) == 1 else results
    if failures:
        raise EvaluationError(failures, told) from (ExceptionGroup("evaluators", errors) if errors else None)
    return told


def _evaluators(
    cfg: CfgNode, dataset_name: str, costs: ExitCosts | TokenCosts | None, semantic_alone: bool
) -> Evaluators:
    """semantic_alone: of several views, which go to a folder of their own."""
    test = cfg.MODEL.MASK_FORMER.TEST
    return evaluators_for(
        dataset_name,
        os.path.join(cfg.OUTPUT_DIR, "inference_TTA" if semantic_alone else "inference"),
        costs=costs,
        semantic_on=test.SEMANTIC_ON,
        instance_on=test.INSTANCE_ON and not semantic_alone,
        panoptic_on=test.PANOPTIC_ON and not semantic_alone,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )

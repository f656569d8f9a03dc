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
    """Quality, and exits taken or tokens kept, on every dataset of DATASETS.TEST.

    Returns {task: {metric: value}} of a single dataset, or {dataset: {task: ...}} of several. All are empty except on
    the first process. With TEST.AUG.ENABLED `sem_seg_TTA` has the mIoU over several views of each image, see
    `MultiScale`.

    Raises ValueError if DATASETS.TEST is empty or a dataset does not suit the model. Raises EvaluationError if
    evaluators failed, once all other results are printed.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name a dataset to evaluate on")
    check_datasets(cfg, cfg.DATASETS.TEST)
    models = {"": model}  # {suffix of the task: model}
    if cfg.TEST.AUG.ENABLED:
        models["_TTA"] = MultiScale.from_config(cfg, model)
    results, failures, errors = {}, {}, []
    costs = costs_of_results(model)
    for name in cfg.DATASETS.TEST:
        check_model_classes(model, name)
        check_policy(model, name)
        results[name] = {}
        for suffix, evaluated in models.items():
            evaluators = _evaluators(cfg, name, costs, semantic_alone=bool(suffix))
            with autocast(cfg, model.device.type, cfg.TEST.AMP):
                found = inference_on_dataset(evaluated, build_test_loader(cfg, name), evaluators) or {}
            results[name] |= {f"{task}{suffix}": values for task, values in found.items()}
            failures |= {f"{kind} on {name}": reason for kind, reason in evaluators.failures.items()}
            errors += evaluators.errors
        if comm.is_main_process():
            logger.info("results on %s:", name)
            print_csv_format(results[name])
    if len(results) == 1:
        (results,) = results.values()
    if failures:
        raise EvaluationError(failures, results) from (ExceptionGroup("evaluators", errors) if errors else None)
    return results


def _evaluators(
    cfg: CfgNode, dataset_name: str, costs: ExitCosts | TokenCosts | None, semantic_alone: bool
) -> Evaluators:
    """semantic_alone: mIoU only, as for `MultiScale`, in a folder of its own."""
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

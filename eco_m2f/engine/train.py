"""Training of the parent, of Step A and of DoViT, with detectron2's trainer."""

import copy
import logging

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, hooks
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.checkpointer import Checkpointer
from ..data.batch_size import split_batch
from ..data.loader import build_train_loader
from ..data.present import loading
from ..evaluation.collect import EvaluationError
from ..modeling import DoViT, EarlyExits
from .datasets import build_test_loader, check_datasets
from .evaluate import evaluate
from .optimizer import autocast, build_optimizer
from .setup import build_model
from .step import Step

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """detectron2's trainer with the step, loaders, optimizer and checkpoints of this project."""

    def __init__(self, cfg: CfgNode):
        super(DefaultTrainer, self).__init__()
        check_training(cfg)
        passes = split_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.IMS_PER_GPU, comm.get_world_size())
        logger.info("%s", passes)
        check_datasets(cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._trainer = Step(
            distributed(model, unused=trains_some_exits(model)),
            self.build_train_loader(cfg, seed),
            optimizer,
            precision=autocast(cfg, model.device.type, cfg.SOLVER.AMP.ENABLED),
            accumulation_steps=passes.count,
            seed=seed,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=self, save_to_disk=comm.is_main_process())
        self.failed_evaluation: EvaluationError | None = None
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Continues from OUTPUT_DIR's last checkpoint if resume is set and there is one; else loads MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
        batches = self._trainer.data_loader.batch_sampler
        batches.seed = self._trainer.seed
        batches.start = self.start_iter * self._trainer.accumulation_steps

    def after_train(self) -> None:
        """After a failed step: evaluates nothing, and only logs errors of hooks, so that the first error is raised."""
        if self.iter >= self.max_iter:
            super().after_train()
            return
        self.storage.iter = self.iter
        for hook in self._hooks:
            if isinstance(hook, hooks.EvalHook):
                continue
            try:
                hook.after_train()
            except Exception:
                logger.exception("after a failed step, %s failed too", type(hook).__name__)

    def build_hooks(self) -> list:
        return [h for h in super().build_hooks() if not isinstance(h, hooks.PreciseBN)]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        logger.info("Model:\n%s", model)
        if isinstance(model, DoViT) and cfg.MODEL.DOVIT.TEACHER:
            load_teacher(model, cfg.MODEL.DOVIT.TEACHER)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, seed: int = 0):
        with loading(", ".join(cfg.DATASETS.TRAIN)):
            return build_train_loader(cfg, seed)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    def test(self, cfg: CfgNode, model: nn.Module, evaluators=None) -> dict:
        """Evaluates during and after training. Failed evaluators do not stop the training, see `train`."""
        try:
            return evaluate(cfg, model) if cfg.DATASETS.TEST else {}
        except EvaluationError as error:
            self.failed_evaluation = error
            logger.error("the training goes on, and will end with an error: %s", error)
            return error.results

    def train(self) -> None:
        """Trains to the end. Then raises EvaluationError if evaluators failed on the way."""
        super().train()
        if self.failed_evaluation:
            raise self.failed_evaluation


def load_teacher(model: DoViT, path: str) -> None:
    """Sets the teacher of a model: the same architecture with the weights at `path`."""
    teacher = copy.deepcopy(model)
    Checkpointer(teacher).load_for_evaluation(path)
    model.set_teacher(teacher)


def check_training(cfg: CfgNode) -> None:
    """Raises ValueError if there is nothing to train on."""
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name a dataset to train on")


def trains_some_exits(model: nn.Module) -> bool:
    """Whether a step may leave parameters without gradient: the layers after the deepest exit drawn."""
    return isinstance(model, EarlyExits) and (
        model.sampler.exits_per_step < len(model.exits) or model.exits[-1] < model.head.exits[-1]
    )


def distributed(model: nn.Module, unused: bool) -> nn.Module:
    """The model, in DistributedDataParallel if there are several processes."""
    if comm.get_world_size() == 1:
        return model
    devices = None if model.device.type == "cpu" else [comm.get_local_rank()]
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, find_unused_parameters=unused)

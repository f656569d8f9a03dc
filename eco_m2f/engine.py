"""Config, training and evaluation: what the tools call. Beside `from_config`, this is the only reader of cfg."""

import argparse
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, default_setup, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.solver.build import reduce_param_groups
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint import Checkpointer
from .command_line import HelpFormatter, argument_parser, hide_training_trace, launch, run  # noqa: F401, for the tools
from .config import add_eco_config, leaves, merge_options, merge_settings, set_in_vain
from .config_file import read_config
from .data import PanopticTestMapper, build_train_loader, check_at_start, check_class_count, register_from_config
from .data.batch_size import split_batch
from .data.categories import SEMANTIC_TYPES, by_position, check_same_classes
from .data.classes import dataset_classes
from .data.datasets import parse_custom
from .data.present import check_present, loading
from .evaluation import EvaluationError, Evaluators, MultiScale, evaluators_for
from .modeling import DoViT, EarlyExits
from .modeling.encoders.hybrid import fuse_for_deployment
from .modeling.exit_policy import OracleExit
from .modeling.parent import Classified
from .predictor import Predictor
from .resuming import settings_before, warn_of_changes

logger = logging.getLogger(__name__)


def load_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """A frozen config from a YAML file and KEY VALUE pairs; its custom datasets are registered.

    Those whose annotation does not exist are left out: prediction can do without, and `check_datasets` asks for them.
    Without a GPU a MODEL.DEVICE of cuda becomes cpu. Raises FileNotFoundError, or ValueError for what does not fit.
    """
    loaded = read_config(config_file)
    cfg = get_cfg()
    add_eco_config(cfg)
    with _explained(f"the config file {config_file}"):
        if loaded.get("VERSION", cfg.VERSION) != cfg.VERSION:
            raise ValueError(f"its VERSION is {loaded['VERSION']!r}, and this software knows {cfg.VERSION} alone")
        merge_settings(cfg, loaded)
        check_numbers(cfg)
    with _explained("the list of options KEY VALUE"):
        merge_options(cfg, opts)
        check_numbers(cfg)
    for key in ("TRAIN", "TEST"):
        if not all(isinstance(name, str) for name in cfg.DATASETS[key]):
            raise ValueError(f"DATASETS.{key} is {cfg.DATASETS[key]!r}, where names of datasets are needed")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    for part in (cfg.MODEL.RESNETS, cfg.MODEL.HYBRID, cfg.MODEL.DOVIT):
        if cfg.MODEL.DEVICE == "cpu" and part.NORM == "SyncBN":
            part.NORM = "BN"  # SyncBN's kernels exist on GPUs alone; the parameters are the same
    register_from_config(cfg.DATASETS.CUSTOM, cfg.DATASETS.TRAIN, absent_ok=True)
    cfg.freeze()
    return cfg


def warn_of_keys_without_effect(cfg: CfgNode) -> None:
    """A warning for each key of detectron2 or Mask2Former that is set, and that nothing here reads."""
    for key, value in set_in_vain(cfg).items() if comm.is_main_process() else ():
        logger.warning("%s is %r, which has no effect: nothing here reads this key", key, value)


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns what yacs raises into a ValueError that says where the key or value came from."""
    try:
        yield
    except (KeyError, AssertionError, ValueError, TypeError, AttributeError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        reason = reason or "a value in it is nested too deeply"
        raise ValueError(
            f"{source} cannot be used: {reason}. The keys and their defaults are in eco_m2f/config.py and detectron2"
        ) from error


def check_numbers(cfg: CfgNode) -> None:
    """Raises ValueError, naming the key, for numbers that are NaN or infinite, and a training without iterations."""
    for key, value in leaves(cfg).items():
        for number in _numbers(value):
            if not math.isfinite(number):
                raise ValueError(f"{key} is {number}, where a finite number is needed")
    if cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}, where at least 1 iteration is needed")


def _numbers(value: object) -> Iterator[float]:
    """The floats in a value, or in its items."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def setup(args: argparse.Namespace) -> CfgNode:
    """Config of the command line, output folder, loggers, seeds."""
    hide_training_trace()
    cfg = load_cfg(args.config_file, args.opts)
    before = None
    if getattr(args, "resume", False) and comm.is_main_process():
        before = settings_before(cfg.OUTPUT_DIR, cfg.SOLVER.IMS_PER_BATCH)
    if comm.get_world_size() > 1 and cfg.MODEL.DEVICE == "cpu" and torch.distributed.get_backend() == "nccl":
        raise ValueError(
            "MODEL.DEVICE is cpu, but the processes took a GPU each: hide these by CUDA_VISIBLE_DEVICES=''"
        )
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="eco_m2f")
    warn_of_keys_without_effect(cfg)
    if before is not None:
        warn_of_changes(before, yaml.safe_load(cfg.dump()))
    return cfg


def gate_settings(cfg: CfgNode) -> dict:
    """What Step C takes from a config: exits, feature, and how a gate is fitted; see `tools/train_gate.py`."""
    eco, solver = cfg.MODEL.ECO, cfg.MODEL.ECO.GATE_SOLVER
    return {
        "exits": list(eco.EXITS),
        "feature_source": eco.FEATURE,
        "beta": [eco.BETA],
        "max_exit": [eco.MAX_EXIT],
        "loss": [eco.LOSS],
        "optimizer": solver.OPTIMIZER,
        "adam_lr": solver.ADAM_LR,
        "adam_batch": solver.ADAM_BATCH,
        "adam_epochs": solver.ADAM_EPOCHS,
        "adam_iterations": solver.ADAM_ITERATIONS,
    }


def build_model(cfg: CfgNode) -> nn.Module:
    """The model of a config, on its device, with the classes of its dataset where that is registered.

    Raises ValueError where the config names a part that does not exist.
    """
    try:
        model = build_detectron2_model(cfg)
    except KeyError as error:
        if "registry" not in str(error):
            raise
        raise ValueError(
            f"the config names an unknown part: {error.args[0]} Correct the name, or import its module"
        ) from error
    names = cfg.DATASETS.TRAIN or cfg.DATASETS.TEST
    classes = dataset_classes(names[0]) if names else []
    if len(classes) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES and isinstance(model, Classified):
        model.set_classes(classes)
    return model


# --- optimisation ----------------------------------------------------------------------------------------------------


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW (or SGD) with Mask2Former's parameter groups, clipping the gradient before each step."""
    kinds = {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    if cfg.SOLVER.OPTIMIZER not in kinds:
        raise ValueError(f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r} is unknown; there are {sorted(kinds)}")
    options = {"momentum": cfg.SOLVER.MOMENTUM} if cfg.SOLVER.OPTIMIZER == "SGD" else {}
    optimizer = kinds[cfg.SOLVER.OPTIMIZER](parameter_groups(cfg, model), lr=cfg.SOLVER.BASE_LR, **options)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED:
        optimizer.register_step_pre_hook(gradient_clipper(clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE))
    return optimizer


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Learning rate and weight decay of every parameter.

    The backbone learns BACKBONE_MULTIPLIER times slower; norms, embeddings and the backbone's position tables have
    decays of their own (0 in the published configs).
    """
    norms = (
        nn.modules.batchnorm._BatchNorm,
        nn.modules.instancenorm._NormBase,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.LocalResponseNorm,
    )
    groups, seen = [], set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY
            if "backbone" in module_name:
                lr *= cfg.SOLVER.BACKBONE_MULTIPLIER
            if any(n in name for n in ("relative_position_bias_table", "pos_embed", "cls_token")):
                decay = 0.0
            if isinstance(module, norms):
                decay = cfg.SOLVER.WEIGHT_DECAY_NORM
            if isinstance(module, nn.Embedding):
                decay = cfg.SOLVER.WEIGHT_DECAY_EMBED
            groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return reduce_param_groups(groups)


def gradient_clipper(kind: str, limit: float, norm_type: float) -> Callable:
    """A hook that clips gradients before an optimizer's step: all as one, or each parameter's by norm or value."""

    def clip(optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if kind == "full_model":
            nn.utils.clip_grad_norm_(parameters, limit, norm_type)
        elif kind == "norm":
            for p in parameters:
                nn.utils.clip_grad_norm_(p, limit, norm_type)
        else:
            nn.utils.clip_grad_value_(parameters, limit)

    if kind not in ("full_model", "norm", "value"):
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {kind!r} is unknown; use full_model, norm or value")
    return clip


def autocast(cfg: CfgNode, device_type: str, enabled: bool) -> torch.autocast:
    """Mixed precision of SOLVER.AMP.PRECISION; does nothing where it is off."""
    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    precision = cfg.SOLVER.AMP.PRECISION
    if precision not in dtypes:
        raise ValueError(f"SOLVER.AMP.PRECISION {precision!r} is unknown; use {' or '.join(dtypes)}")
    return torch.autocast(device_type, dtypes[precision], enabled=enabled)


class Step(SimpleTrainer):
    """One optimizer step: mixed precision on any device, gradient accumulation, and losses that must be finite.

    Random numbers (points, dropout) depend on the seed, the iteration and the batch alone, whichever process has it: a
    resumed run draws what an uninterrupted one would have, and two processes draw what one would.
    """

    def __init__(
        self, model, data_loader, optimizer, *, precision: torch.autocast, accumulation_steps: int = 1, seed: int = 0
    ):
        """
        Args:
            precision: the context of the forward pass.
            accumulation_steps: batches whose mean gradient makes one step. Each batch's losses are divided by its own
                number of masks, so the step is exactly that of one large batch where these numbers are equal.
        """
        super().__init__(model, data_loader, optimizer)
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps must be at least 1, got {accumulation_steps}")
        self.accumulation_steps = accumulation_steps
        self.precision = precision
        self.seed = seed
        # bfloat16 has the range of float32, so only float16 gradients need scaling.
        scales = precision._enabled and precision.fast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(precision.device, enabled=scales)

    def run_step(self) -> None:
        self.optimizer.zero_grad()
        total, data_time = {}, 0.0
        for i in range(self.accumulation_steps):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            key = np.random.SeedSequence([self.seed, 0, self.iter, i * comm.get_world_size() + comm.get_rank()])
            torch.manual_seed(int(key.generate_state(1)[0]))
            last = i + 1 == self.accumulation_steps
            waits = isinstance(self.model, DistributedDataParallel) and not last
            with self.model.no_sync() if waits else contextlib.nullcontext():
                losses = self._backward(batch)
            total = {name: total.get(name, 0) + loss / self.accumulation_steps for name, loss in losses.items()}
        self.after_backward()
        self._write_metrics(total, data_time)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _backward(self, batch: list[dict]) -> dict[str, Tensor]:
        with self.precision, enough_values(batch):
            losses = self.model(batch)
            loss = sum(losses.values())
        check_finite(losses, self.iter, batch)
        self.scaler.scale(loss / self.accumulation_steps).backward()
        return {name: value.detach() for name, value in losses.items()}

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.scaler.state_dict(), "seed": self.seed}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.scaler.load_state_dict(state.get("grad_scaler", {}))
        self.seed = state.get("seed", self.seed)


@contextlib.contextmanager
def enough_values(batch: list[dict]) -> Iterator[None]:
    """Says what to do where BatchNorm finds a single value per channel, of which it cannot take the variance."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        images = ", ".join(f"{_name(x)} ({x['image'].shape[-1]}x{x['image'].shape[-2]})" for x in batch)
        raise ValueError(
            f"BatchNorm in training needs more than one value per channel, but the images {images} leave a map of one "
            "pixel: raise SOLVER.IMS_PER_GPU and SOLVER.IMS_PER_BATCH, or the size (INPUT.MIN_SIZE_TRAIN, "
            "INPUT.MAX_SIZE_TRAIN, INPUT.IMAGE_SIZE), or keep its statistics with MODEL.RESNETS.NORM FrozenBN "
            "(MODEL.TIMM.FREEZE_BN True)"
        ) from error


def _name(x: dict) -> str:
    return str(x.get("file_name", x.get("image_id", "?")))


def check_finite(losses: dict[str, Tensor], iteration: int, batch: list[dict]) -> None:
    """Raises FloatingPointError, naming iteration, losses and images, if a loss is NaN or infinite."""
    values = torch.stack([v.detach() for v in losses.values()]).tolist()  # one transfer for all losses
    broken = {name: v for name, v in zip(losses, values) if v != v or abs(v) == float("inf")}
    if broken:
        images = [x.get("image_id", x.get("file_name", "?")) for x in batch]
        names = ", ".join(f"{n} = {v}" for n, v in list(broken.items())[:4])
        raise FloatingPointError(
            f"at iteration {iteration} the loss is not finite ({names}) on images {images}: look at these images and "
            "their annotation, lower SOLVER.BASE_LR, or turn SOLVER.AMP.ENABLED off"
        )


class Trainer(DefaultTrainer):
    """detectron2's trainer, for the parent and for Step A."""

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
        """Goes on from OUTPUT_DIR's last checkpoint if asked and there is one; else loads MODEL.WEIGHTS."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
        batches = self._trainer.data_loader.batch_sampler
        batches.seed = self._trainer.seed
        batches.start = self.start_iter * self._trainer.accumulation_steps

    def after_train(self) -> None:
        """After a step that failed nothing is evaluated, and no other error takes the place of the first."""
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
            model.load_teacher(cfg.MODEL.DOVIT.TEACHER)
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
        """Evaluates, in between and in the end. Evaluators that fail do not end the training, see `train`."""
        try:
            return evaluate(cfg, model) if cfg.DATASETS.TEST else {}
        except EvaluationError as error:
            self.failed_evaluation = error
            logger.error("the training goes on, and ends with an error: %s", error)
            return error.results

    def train(self) -> None:
        """Trains to the end. Raises EvaluationError then, where an evaluation on the way was not complete."""
        super().train()
        if self.failed_evaluation:
            raise self.failed_evaluation


def check_training(cfg: CfgNode) -> None:
    """Raises ValueError where there is nothing to train on."""
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name a dataset to train on")


def trains_some_exits(model: nn.Module) -> bool:
    """Whether a step may leave parameters without gradient: the layers beyond the deepest exit drawn."""
    return isinstance(model, EarlyExits) and (
        model.sampler.exits_per_step < len(model.exits) or model.exits[-1] < model.head.exits[-1]
    )


def distributed(model: nn.Module, unused: bool) -> nn.Module:
    """The model under DistributedDataParallel where there are several processes."""
    if comm.get_world_size() == 1:
        return model
    devices = None if model.device.type == "cpu" else [comm.get_local_rank()]
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, find_unused_parameters=unused)


# --- evaluation ------------------------------------------------------------------------------------------------------


def check_datasets(cfg: CfgNode, names: Sequence[str]) -> None:
    """Stops early on a dataset that is not there, of other classes than the model's, or with a faulty JSON."""
    wanted = [entry for entry in cfg.DATASETS.CUSTOM if parse_custom(entry)["name"] in names]
    register_from_config(wanted, cfg.DATASETS.TRAIN)  # those that are absent end here
    check_number_of_classes(cfg, names)
    check_present(*names)
    evaluated = cfg.DATASETS.TEST if cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON else ()
    check_at_start(names, _training_set(cfg), evaluated)


def check_number_of_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    """Stops on a dataset without the kind of annotation that the model needs, or of another number of classes."""
    known = cfg.MODEL.META_ARCHITECTURE in META_ARCH_REGISTRY  # else building the model says what is wrong
    parent = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE) if known else None
    annotation = getattr(parent, "annotation", "panoptic")
    for name in dict.fromkeys(names):
        check_class_count(name, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, annotation, _training_set(cfg))


def _training_set(cfg: CfgNode) -> str | None:
    """The dataset that says which classes there are: the first of DATASETS.TRAIN that is registered."""
    return next((name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog.list()), None)


def check_model_classes(model: nn.Module, dataset_name: str) -> None:
    """Raises ValueError, with both lists, unless a dataset has the classes of the model, numbered alike."""
    trained = getattr(getattr(model, "module", model), "classes", None)
    if not trained:
        return
    classes = dataset_classes(dataset_name)
    if MetadataCatalog.get(dataset_name).get("evaluator_type") in SEMANTIC_TYPES:
        trained, classes = by_position(trained), by_position(classes)
    check_same_classes(trained, classes, "the model", f"dataset {dataset_name!r}")


def check_oracle(model: nn.Module, dataset_name: str) -> None:
    """Stops early where an oracle knows other images, or the qualities of other weights, than those to be evaluated."""
    model = getattr(model, "module", model)
    policy = getattr(model, "exit_policy", None)
    if not isinstance(policy, OracleExit):
        return
    from .derived import parent_sha256  # needs pyarrow, as this policy does

    if _annotation(policy.dataset) != _annotation(dataset_name):
        raise ValueError(
            f"MODEL.ECO.DERIVED {policy.derived} is of {policy.dataset!r}, but {dataset_name!r} is evaluated: derive it"
        )
    if policy.parent_sha256 != parent_sha256(model.state_dict()):
        raise ValueError(
            f"MODEL.ECO.DERIVED {policy.derived} was made with other weights: load those, or derive it anew"
        )


def _annotation(dataset_name: str) -> str:
    """The annotation file of a dataset, or its name: a split may be registered twice, with and without class maps."""
    metadata = MetadataCatalog.get(dataset_name) if dataset_name in DatasetCatalog.list() else None
    files = (getattr(metadata, key, None) for key in ("panoptic_json", "json_file"))
    return next((file for file in files if file), dataset_name)


def build_test_loader(cfg: CfgNode, dataset_name: str):
    """Images one by one at test size, each rank its share."""
    with loading(dataset_name):
        return build_detection_test_loader(cfg, dataset_name, mapper=PanopticTestMapper(cfg))


def build_trained(cfg: CfgNode, with_gate: bool = True) -> nn.Module:
    """The model of a config in eval mode, MODEL.WEIGHTS loaded strictly; with its gate where the policy is learned."""
    model = build_model(cfg)
    Checkpointer(model).load_for_evaluation(cfg.MODEL.WEIGHTS)
    check_things_known(model, cfg.MODEL.WEIGHTS)
    if with_gate and isinstance(model, EarlyExits) and cfg.MODEL.ECO.POLICY == "LinearGate":
        model.load_gate(cfg.MODEL.ECO.GATE)
    return model.eval()


def check_things_known(model: nn.Module, weights: str) -> None:
    """Raises ValueError for a panoptic model whose classes neither a dataset nor its checkpoint tells."""
    postprocessor = getattr(model, "postprocessor", None)
    if getattr(postprocessor, "panoptic_on", False) and getattr(model, "classes", None) is None:
        raise ValueError(
            f"which of the model's classes are things is not known: the checkpoint {weights} does not hold its "
            "classes, and DATASETS.TRAIN names no registered dataset with MODEL.SEM_SEG_HEAD.NUM_CLASSES "
            f"{postprocessor.num_classes} categories. Name the dataset that it was trained on; the JSON of the "
            "annotation is enough (DATASETS.CUSTOM). Or save the checkpoint anew by train_net.py --resume beside it"
        )


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
    for name in cfg.DATASETS.TEST:
        check_model_classes(model, name)
        check_oracle(model, name)
        results[name] = {}
        for suffix, part in judged.items():
            evaluators = _evaluators(cfg, name, semantic_alone=bool(suffix))
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


def _evaluators(cfg: CfgNode, dataset_name: str, semantic_alone: bool) -> Evaluators:
    """semantic_alone: of several views, which go to a folder of their own."""
    test = cfg.MODEL.MASK_FORMER.TEST
    return evaluators_for(
        dataset_name,
        os.path.join(cfg.OUTPUT_DIR, "inference_TTA" if semantic_alone else "inference"),
        semantic_on=test.SEMANTIC_ON,
        instance_on=test.INSTANCE_ON and not semantic_alone,
        panoptic_on=test.PANOPTIC_ON and not semantic_alone,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def load_predictor(config_file: str, opts: Sequence[str] = ()) -> Predictor:
    """A function from an image (a path, a PIL image, an array or a tensor) to the model's result, at the image's size.

    The datasets of the config need not be there: the checkpoint holds the classes. TEST.AMP and TEST.COMPILE hold here
    too. Example: `load_predictor("configs/toy/eco.yaml", ["MODEL.WEIGHTS", "model.pth"])(image)["panoptic_seg"]`.
    """
    cfg = load_cfg(config_file, opts)
    warn_of_keys_without_effect(cfg)
    model = fuse_for_deployment(build_trained(cfg))
    if cfg.TEST.COMPILE:
        compile_for_deployment(model)
    return Predictor(model, PanopticTestMapper(cfg), lambda: autocast(cfg, model.device.type, cfg.TEST.AMP))


def compile_for_deployment(model: nn.Module) -> None:
    """Lets torch.compile have backbone and head of a model in eval mode, in place, with the weights as they are now.

    Every size of (padded) image, and every exit, is compiled when it is first met, which takes about a minute; after
    eight of them PyTorch runs new ones as they are. So this is for few sizes, and for a fixed exit or a gate.
    Inductor freezes weights from then on in this process: it packs them for its matrix products.
    """
    from torch._inductor import config

    config.freezing = True
    for part in (model.backbone, model.head):
        part.compile(dynamic=False)

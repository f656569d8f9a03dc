"""Step B: computes the quality of every image of a split at every exit.

MODEL.ECO.QUALITY names the quality, see `quality/registry.py`. Backbone and encoder run once per image, the decoder
once per exit. Images run one by one, so the result does not depend on the batch or on the number of processes. While
the model runs on the next image, workers compare earlier predictions with the ground truth.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.utils import comm
from torch.utils.data import SequentialSampler
from tqdm import tqdm

from .. import __version__
from ..checkpoint.parent_hash import parent_sha256
from ..costs import ExitCosts
from ..data.mappers import PanopticTestMapper
from ..data.parallel import map_in_workers
from ..data.present import loading
from ..derived.locking import locked_folder
from ..derived.schema import named_in_provenance, view_in_provenance
from ..derived.writer import ShardWriter
from ..files import file_sha256
from ..modeling import EarlyExits
from ..policies.registry import check_feature_source
from ..quality import quality_of_model
from .datasets import check_datasets, check_model_classes
from .predicted import Predicted

logger = logging.getLogger(__name__)


def derive(
    cfg: CfgNode,
    model: EarlyExits,
    dataset_name: str,
    directory: str,
    shard_size: int,
    workers: int = 0,
    hash_images: bool = False,
    view: str = "plain",
) -> None:
    """Writes the derived dataset of a split to `directory`, shard by shard. Existing shards are kept.

    Every process of a distributed run calls it and takes its share of the missing shards. Each has `workers` processes
    that compare predictions with the ground truth; with 0 it compares them itself. The files are the same, byte for
    byte, for any number of processes and workers. hash_images: the provenance covers the bytes of the images, which are
    then read once more, and not only their sizes. view: with "mirrored" the model sees each image mirrored from left to
    right. Its predictions are mirrored back before they are compared with the ground truth.
    Raises ChildProcessError if a worker died, and ValueError if another run uses the directory.
    """
    if not isinstance(model, EarlyExits):
        raise ValueError(
            f"Step B needs META_ARCHITECTURE EcoMaskFormer or EcoDetr (an eco config), got {type(model).__name__}"
        )
    if workers < 0:
        raise ValueError(f"--workers must be 0 or more, got {workers}")
    kind = quality_of_model(cfg.MODEL.ECO.QUALITY, model)
    if view == "mirrored" and not hasattr(kind, "mirrored"):
        raise ValueError(f"MODEL.ECO.QUALITY {kind.__name__} cannot mirror predictions: add `mirrored` to its class")
    check_datasets(cfg, [dataset_name])
    check_model_classes(model, dataset_name)
    with loading(dataset_name):
        records = DatasetCatalog.get(dataset_name)
    quality = kind.of(dataset_name)
    provenance = provenance_of(cfg, model, dataset_name, quality, len(records)) | view_in_provenance(view)

    def images(indices: Sequence[int]) -> dict[str, str]:
        return image_digests([records[i] for i in indices], hash_images, quality.files)

    with locked_folder(directory) if comm.is_main_process() else contextlib.nullcontext():
        writer = open_writer(directory, provenance, len(records), shard_size, images)
        write_missing(cfg, model, quality, records, writer, workers, view == "mirrored")


def write_missing(
    cfg: CfgNode,
    model: EarlyExits,
    quality,
    records: Sequence[dict],
    writer: ShardWriter,
    workers: int,
    mirrored: bool = False,
) -> None:
    """Derives and writes this process's share of the missing shards."""
    shards = writer.missing(comm.get_rank(), comm.get_world_size())
    wanted = [i for s in shards for i in writer.indices(s)]
    logger.info("%d of %d shards are missing here: %d images", len(shards), writer.num_shards, len(wanted))
    clock = _Clock()
    ours = [records[i] for i in wanted]
    with contextlib.closing(derived_rows(cfg, model, quality, ours, workers, clock, mirrored)) as made:
        rows = iter(
            tqdm(
                made,
                total=len(wanted),
                desc=writer.manifest["dataset"],
                disable=not comm.is_main_process(),
                unit="image",
            )
        )
        for shard in shards:
            writer.write(shard, [next(rows) for _ in writer.indices(shard)])
    if wanted:
        logger.info("the model was busy %.0f %% of %.1f s", 100 * clock.busy / clock.passed(), clock.passed())
    comm.synchronize()


def open_writer(directory: str, *settings) -> ShardWriter:
    """The writer of every process. Only the first process creates the folder and its manifest."""
    if not comm.is_main_process():
        comm.synchronize()
    writer = ShardWriter(directory, *settings)
    if comm.is_main_process():
        comm.synchronize()
    return writer


def provenance_of(cfg: CfgNode, model: EarlyExits, dataset_name: str, quality, num_images: int) -> dict:
    """Everything that the derived rows depend on. All parts of one derived dataset have the same."""
    check_feature_source(cfg.MODEL.ECO.FEATURE)
    keys = ("id", "name", "isthing")
    return {
        "exits": list(model.exits),
        "feature_source": cfg.MODEL.ECO.FEATURE,
        "dataset": dataset_name,
        "annotation_sha256": annotation_sha256(dataset_name),
        "num_images": num_images,
        "categories": [{k: c[k] for k in keys if k in c} for c in quality.categories],
        "checkpoint": Path(cfg.MODEL.WEIGHTS).name,
        "checkpoint_sha256": file_sha256(cfg.MODEL.WEIGHTS),
        "parent_sha256": parent_sha256(model.state_dict()),
        "config": model_config(cfg).dump(),
        "code_version": __version__,
        **named_in_provenance(quality.name),
    }


def annotation_sha256(dataset_name: str) -> str:
    """Digest of a dataset's annotation files, which give the images, their order and their content."""
    metadata = MetadataCatalog.get(dataset_name)
    files = [metadata.get(key) for key in ("panoptic_json", "json_file")]
    return _sha256_of(file_sha256(file) for file in files if file)


def image_digests(records: Sequence[dict], contents: bool, truth: Sequence[str]) -> dict[str, str]:
    """sha256 of the names and sizes of the records' files. contents: also of their bytes.

    The files are the images, and the ground-truth files under the keys of truth.
    """
    files = [Path(r[key]) for r in records for key in ("file_name", *truth) if key in r]
    digests = {"names and sizes": _sha256_of(json.dumps([p.name, os.stat(p).st_size]) for p in files)}
    return {**digests, "contents": _sha256_of(map(file_sha256, files))} if contents else digests


def _sha256_of(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def model_config(cfg: CfgNode) -> CfgNode:
    """The parts of the config that predictions depend on: no paths, and no settings of the training."""
    kept = CfgNode({"MODEL": cfg.MODEL.clone(), "INPUT": cfg.INPUT.clone(), "TEST": cfg.TEST.clone()})
    kept.MODEL.pop("WEIGHTS")
    kept.MODEL.pop("DEVICE")
    for key in (
        "QUALITY",
        "POLICY",
        "EXIT",
        "GATE",
        "MAX_EXIT",
        "CHANGE_THRESHOLD",
        "BETA",
        "DERIVED",
        "LOSS",
        "GATE_SOLVER",
    ):
        kept.MODEL.ECO.pop(key)  # all exits run, gates come later, and the quality has its own key
    return kept


class _Clock:
    """Measures how long the model was busy since this object was made."""

    def __init__(self):
        self.busy, self._start = 0.0, time.perf_counter()

    def passed(self) -> float:
        return time.perf_counter() - self._start

    def timed(self, function: Callable, *args):
        start = time.perf_counter()
        result = function(*args)
        self.busy += time.perf_counter() - start
        return result


@torch.no_grad()
def derived_rows(
    cfg: CfgNode,
    model: EarlyExits,
    quality,
    records: Sequence[dict],
    workers: int,
    clock: _Clock,
    mirrored: bool = False,
) -> Iterator[dict]:
    """Yields the derived row of every record, in order."""
    if not records:
        return
    loader = build_detection_test_loader(
        list(records),
        mapper=PanopticTestMapper(cfg),
        sampler=SequentialSampler(records),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    model.eval()
    read = (cfg.MODEL.ECO.FEATURE, ExitCosts(model), mirrored)
    predicted = (clock.timed(predict_exits, model, quality, batch[0], *read) for batch in loader)
    yield from map_in_workers(Predicted.row, predicted, workers)


def predict_exits(
    model: EarlyExits, quality, x: dict, source: str, costs: ExitCosts, mirrored: bool = False
) -> Predicted:
    """Runs one mapped image through the model once, to all exits. source: the map that the gate reads.

    mirrored: the model sees the image mirrored from left to right, and its predictions are mirrored back. This is done
    at the size of the image, so it is exact for any size and padding.
    """
    compare = quality.comparison(x)
    images = model.preprocess([{**x, "image": x["image"].flip(-1)} if mirrored else x])
    features = model.extract(images)
    predictions = model.head.forward_exits(features, model.exits)
    gflops = costs(images.tensor.shape[-2:], (x["height"], x["width"]))
    prepared = [quality.prepare(model, predictions[k], images, x) for k in model.exits]
    if mirrored:
        prepared = [quality.mirrored(prediction, x["width"]) for prediction in prepared]
    pooled = model.pooled_feature(features, images.image_sizes, source)[0]
    return Predicted(
        image={**{k: x[k] for k in ("image_id", "height", "width")}, "file_name": Path(x["file_name"]).name},
        exits=model.exits,
        predictions=prepared,
        compare=compare,
        feature=pooled.float().cpu().numpy(),
        total_gflops=[gflops[k]["total"] for k in model.exits],
        encoder_gflops=[gflops[k]["encoder"] for k in model.exits],
    )

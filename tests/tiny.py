"""A toy set of a few images, configs of small models for it, and functions that run tools, for end-to-end tests."""

import contextlib
import importlib
import io
import itertools
import logging
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from minis import CONFIGS, ROOT

_COUNTER = itertools.count()
CONFIG = """
_BASE_: {base}
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 4, NORM: "FrozenBN"}}
  SWIN: {{EMBED_DIM: 16, DEPTHS: [1, 1, 1, 1], NUM_HEADS: [1, 1, 2, 2], WINDOW_SIZE: 4}}
  SEM_SEG_HEAD: {{NUM_CLASSES: {classes}, CONVS_DIM: 32, MASK_DIM: 32}}
  MASK_FORMER: {{HIDDEN_DIM: 32, DIM_FEEDFORWARD: 64, NUM_OBJECT_QUERIES: 12, DEC_LAYERS: 3, TRAIN_NUM_POINTS: 64}}
  DETR: {{HIDDEN_DIM: 32, DIM_FEEDFORWARD: 64, NUM_OBJECT_QUERIES: 12, DEC_LAYERS: 2}}
DATASETS:
  CUSTOM: ["{train}", "{val}"]
  TRAIN: ["{name}_train"]
  TEST: ["{name}_val"]
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 4, WARMUP_ITERS: 0, CHECKPOINT_PERIOD: 2, AMP: {{ENABLED: False}}}}
INPUT: {{MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 128, IMAGE_SIZE: 64}}
DATALOADER: {{NUM_WORKERS: 0}}
OUTPUT_DIR: "{output}"
"""


class Tiny:
    """A toy set in `base`/data under its own name, and configs in `base`."""

    def __init__(self, base: Path, num_train: int = 4, num_val: int = 3, size: int = 64):
        from eco_m2f.data.toy import ToySpec, make_toy_dataset

        self.base = base
        self.name = f"tiny{next(_COUNTER)}"
        make_toy_dataset(base / "data", ToySpec(num_train, num_val, size))

    def spec(self, split: str, boxes: bool = False) -> str:
        """The DATASETS.CUSTOM entry of a split."""
        data = self.base / "data"
        if boxes:
            return f"name={self.dataset(split, True)},images={data / split},boxes={self.json(split, 'detection')}"
        folders = f"images={data / split},panoptic={data / f'panoptic_{split}'}"
        return f"name={self.dataset(split)},{folders},json={self.json(split)}"

    def json(self, split: str, kind: str = "panoptic") -> Path:
        return self.base / "data" / "annotations" / f"{kind}_{split}.json"

    def dataset(self, split: str, boxes: bool = False) -> str:
        """The registered name of a split."""
        return f"{self.name}_{'boxes_' if boxes else ''}{split}"

    def config(self, kind: str = "eco_maskformer2") -> str:
        """The path of a config with OUTPUT_DIR `base`/output.

        kind: one of configs/toy, e.g. "maskformer2" or "eco_detr", or the path of another config below configs/.
        """
        base = CONFIGS / (kind if kind.endswith(".yaml") else f"toy/{kind}_toy.yaml")
        boxes = "detr" in base.name
        path = self.base / f"{base.stem}.yaml"
        path.write_text(
            CONFIG.format(
                base=base,
                train=self.spec("train", boxes),
                val=self.spec("val", boxes),
                classes=5 if boxes else 9,
                name=self.dataset("", boxes).rstrip("_"),
                output=self.output,
            )
        )
        return str(path)

    @property
    def output(self) -> Path:
        return self.base / "output"


def tool(name: str, *arguments, launcher=(), timeout: int = 600, **environment) -> subprocess.CompletedProcess:
    """Runs tools/`name`.py in a new process without GPUs, and waits for it."""
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=tool_environment(**environment),
    )


def call(name: str, *arguments) -> int:
    """Runs tools/`name`.py in this process, which is seconds faster than `tool`. Returns the exit status.

    It skips only the call that makes the C library keep freed memory, which would be many gigabytes in tests.
    """
    path = str(ROOT / "tools" / f"{name}.py")
    quiet = mock.patch("eco_m2f.engine.command_line.keep_freed_memory")
    with mock.patch.object(sys, "argv", [path, *map(str, arguments)]), kept_log_handlers(), quiet:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
                return 1
            return end.code or 0
    return 0


def here(name: str, *arguments) -> subprocess.CompletedProcess:
    """Like `tool`, but in this process, which has imported everything. For runs of one process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = call(name, *arguments)
    return subprocess.CompletedProcess([name, *arguments], status, out.getvalue(), err.getvalue())


def in_processes(name: str, *arguments) -> subprocess.CompletedProcess:
    """As `tool`, for --num-gpus above 1: this process, which has imported everything already, starts them."""
    module = importlib.import_module(name)
    args = module.build_parser().parse_args([str(a) for a in arguments])
    return launched(module.main, args)


def launched(main: Callable, args) -> subprocess.CompletedProcess:
    """Calls main(args) in args.num_gpus processes that this one starts; what they print is that of all of them."""
    from eco_m2f.engine.command_line import launch, run

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with printing_to(out, err), mock.patch.dict(os.environ, tool_environment(), clear=True):
            status = run(launch, main, args)
        printed = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess([main, args], status, *printed)


@contextlib.contextmanager
def printing_to(*files) -> Iterator[None]:
    """What this process and those that it starts print goes to two files, as in a shell."""
    kept = [os.dup(fd) for fd in (1, 2)]
    try:
        for fd, file in zip((1, 2), files):
            os.dup2(file.fileno(), fd)
        with contextlib.redirect_stdout(files[0]), contextlib.redirect_stderr(files[1]):
            yield
    finally:
        for fd, before in zip((1, 2), kept):
            os.dup2(before, fd)
            os.close(before)


@contextlib.contextmanager
def kept_log_handlers() -> Iterator[None]:
    """Removes the log handlers added meanwhile, because their files are deleted after the test."""
    from detectron2.utils.logger import setup_logger

    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "eco_m2f")]
    before = [(log, list(log.handlers), log.propagate) for log in loggers]
    yield
    setup_logger.cache_clear()  # else the next call with these arguments would add none
    for log, handlers, propagate in before:
        log.handlers[:], log.propagate = handlers, propagate


def tool_environment(**more) -> dict[str, str]:
    """The environment of a tool in a test: one thread, no GPU, no variables of torchrun."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "", **more}


def is_running(pid: int) -> bool:
    return _status(pid)[0] != "Z"


def workers_of(pid: int) -> set[int]:
    """The spawned Python child processes of this process."""
    found = {int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()}
    return {p for p in found if _status(p)[1] == str(pid) and b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()}


def _status(pid: int) -> list[str]:
    """State and parent of a process; state Z if it does not exist, as for an ended process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return ["Z", ""]

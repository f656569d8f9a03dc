"""The optimizer step of a training."""

import contextlib
import time
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Step(SimpleTrainer):
    """One optimizer step with mixed precision and gradient accumulation. Losses must be finite, see `check_finite`.

    Random numbers (points, dropout) depend only on the seed, the iteration and the batch. So a resumed run draws the
    same as an uninterrupted one, and two processes draw the same as one.
    """

    def __init__(
        self, model, data_loader, optimizer, *, precision: torch.autocast, accumulation_steps: int = 1, seed: int = 0
    ):
        """
        Args:
            precision: the context of the forward pass.
            accumulation_steps: number of batches whose mean gradient makes one step. Each batch's losses are divided
                by its own number of masks. If these numbers are equal, the step is exactly that of one large batch.
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
    """Adds images and remedy to the error of a BatchNorm with one value per channel, which has no variance."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        images = ", ".join(f"{_name(x)} ({x['image'].shape[-1]}x{x['image'].shape[-2]})" for x in batch)
        raise ValueError(
            f"BatchNorm in training needs more than one value per channel, but the images {images} give a map of one "
            "pixel. Raise SOLVER.IMS_PER_GPU and SOLVER.IMS_PER_BATCH, or the size (INPUT.MIN_SIZE_TRAIN, "
            "INPUT.MAX_SIZE_TRAIN, INPUT.IMAGE_SIZE). Or fix its statistics with MODEL.RESNETS.NORM FrozenBN "
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
            f"at iteration {iteration} the loss is not finite ({names}) on images {images}: check these images and "
            "their annotation, lower SOLVER.BASE_LR, or turn SOLVER.AMP.ENABLED off"
        )

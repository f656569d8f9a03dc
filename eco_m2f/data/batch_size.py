"""Splits the images of an optimizer step over processes and passes."""

from dataclasses import dataclass
from math import isqrt


@dataclass(frozen=True)
class Passes:
    """Each of `processes` runs `count` passes a step over `images` images each. The gradient is the mean of all."""

    processes: int
    images: int
    count: int

    def __str__(self) -> str:
        total = self.processes * self.images * self.count
        return (
            f"{total} images an optimizer step: processes {self.processes}, images per process and pass {self.images}, "
            f"passes per step {self.count}"
        )


def split_batch(batch: int, images_per_gpu: int, processes: int) -> Passes:
    """The passes of a step. Together they see `batch` images, with any number of processes.

    Args:
        batch: SOLVER.IMS_PER_BATCH, the images of a whole step.
        images_per_gpu: SOLVER.IMS_PER_GPU, the most images in one pass; 0: all images of a process at once.

    Raises ValueError if images would be left over. The message names keys and values that fit.
    """
    if batch < 1 or batch % processes:
        raise ValueError(_unequal_shares(batch, processes))
    share = batch // processes
    images = min(images_per_gpu or share, share)
    if images < 1 or share % images:
        raise ValueError(
            f"SOLVER.IMS_PER_GPU is {images_per_gpu}, which does not divide the {share} images that each of "
            f"{processes} process(es) has of SOLVER.IMS_PER_BATCH {batch}: set it to "
            f"{_either(_nearest_divisors(share, images))}, or to 0 for all at once"
        )
    return Passes(processes, images, share // images)


def _unequal_shares(batch: int, processes: int) -> str:
    below = max(batch - batch % processes, 0)
    message = (
        f"SOLVER.IMS_PER_BATCH is {batch}, which {processes} process(es) cannot share equally: set it to "
        f"{_either([n for n in (below, below + processes) if n > 0])}"
    )
    fitting = _nearest_divisors(batch, processes)
    return f"{message}, or start {_either(fitting)} process(es) (--num-gpus)" if fitting else message


def _nearest_divisors(number: int, to: int) -> list[int]:
    """The divisors of `number` nearest to `to`, below and above it, if there are any."""
    small = [n for n in range(1, isqrt(max(number, 0)) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    below, above = [n for n in divisors if n < to], [n for n in divisors if n > to]
    return below[-1:] + above[:1]


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))

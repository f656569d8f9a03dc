"""How a step's images are split: the whole batch with any number of processes, or an error with values that fit."""

import re

import pytest

from eco_m2f.data.batch_size import Passes, split_batch


@pytest.mark.parametrize(
    "batch, images_per_gpu, processes, images, passes",
    [
        *((16, 2, 1, 2, 8), (16, 2, 2, 2, 4), (16, 2, 4, 2, 2), (16, 2, 8, 2, 1), (16, 2, 16, 1, 1)),
        *((16, 0, 1, 16, 1), (16, 0, 4, 4, 1), (16, 16, 2, 8, 1), (16, 1, 2, 1, 8), (12, 3, 2, 3, 2), (1, 0, 1, 1, 1)),
    ],
)
def test_processes_and_passes_see_the_whole_batch(batch, images_per_gpu, processes, images, passes):
    split = split_batch(batch, images_per_gpu, processes)
    assert split == Passes(processes, images, passes)
    assert split.processes * split.images * split.count == batch


def test_the_log_line_says_all_numbers():
    line = str(split_batch(16, 2, 4))
    assert line == "16 images an optimizer step: processes 4, images per process and pass 2, passes per step 2"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((16, 2, 3), "IMS_PER_BATCH is 16, .* 3 process.*: set it to 15 or 18, or start 2 or 4 process.*num-gpus"),
        ((7, 0, 2), "IMS_PER_BATCH is 7, .* 2 process.*: set it to 6 or 8, or start 1 or 7 process"),
        ((2, 2, 8), "IMS_PER_BATCH is 2, .* 8 process.*: set it to 8, or start 2 process"),
        ((0, 2, 2), "IMS_PER_BATCH is 0, .* 2 process.*: set it to 2$"),
        ((-4, 2, 2), "IMS_PER_BATCH is -4, .* 2 process.*: set it to 2$"),
        ((16, 3, 2), "IMS_PER_GPU is 3, .* 8 images .*2 process.*IMS_PER_BATCH 16: set it to 2 or 4, or to 0"),
        ((16, 6, 1), "IMS_PER_GPU is 6, .* 16 images .*1 process.*IMS_PER_BATCH 16: set it to 4 or 8, or to 0"),
        ((16, -1, 1), "IMS_PER_GPU is -1, .*: set it to 1, or to 0"),
    ],
)
def test_what_does_not_divide_is_refused_with_values_that_fit(arguments, message):
    """Each value in the message is accepted."""
    with pytest.raises(ValueError, match=message) as raised:
        split_batch(*arguments)
    batch, images, processes = arguments
    message = str(raised.value)
    for value in map(int, re.findall(r"\d+", re.search(r"set it to ([\d or]+)", message)[1])):
        assert split_batch(*((value, 0, processes) if "BATCH is" in message else (batch, value, processes)))
    for value in map(int, re.findall(r"\d+", (re.search(r"start ([\d or]+)", message) or ("", ""))[1])):
        assert split_batch(batch, 0, value)

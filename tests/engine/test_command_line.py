"""Starting processes, and what a tool prints and returns after input errors and bugs."""

import logging
import platform
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from eco_m2f.checkpoint.safe_load import CheckpointError
from eco_m2f.data.panoptic_map import DataError
from eco_m2f.engine import command_line

pytestmark = pytest.mark.slow


def fail_with(error: BaseException):
    raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("v"), FileNotFoundError("no file"), ImportError("i"), FloatingPointError("nan"), CheckpointError("c")],
)
def test_a_mistake_ends_in_one_line_and_status_1(capsys, error):
    assert command_line.run(fail_with, error) == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_the_exit_status_is_what_the_function_returns():
    assert [command_line.run(lambda: status) for status in (None, 0, 1)] == [0, 0, 1]


def test_a_fault_of_the_program_shows_its_trace():
    with pytest.raises(KeyError):
        command_line.run(fail_with, KeyError("bug"))


def test_success_is_status_0_and_an_interruption_130(capsys):
    assert command_line.run(lambda: None) == 0
    assert command_line.run(fail_with, KeyboardInterrupt()) == 130
    assert "--resume" in capsys.readouterr().err


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise DataError("image 7 is broken: restore it")


def test_a_mistake_in_a_loaders_process_is_one_line_too(capsys):
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1)
    assert command_line.run(list, loader) == 1
    assert capsys.readouterr().err == "error: image 7 is broken: restore it\n"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = command_line.argument_parser("").parse_args(["--config-file", "c.yaml", "--num-gpus", "2"])
    with pytest.raises(ValueError, match="--num-gpus 2 is more than this machine's 1"):
        command_line.launch(fail_with, args)


def test_the_common_options_have_their_defaults_in_the_help():
    printed = " ".join(command_line.argument_parser("What it does.").format_help().split())
    assert "What it does." in printed and "(default: auto)" in printed and "KEY VALUE" in printed


def test_a_mistake_in_one_of_several_processes_is_one_line(capsys):
    try:
        raise DataError("7.png is broken: restore it")
    except DataError:
        trace = traceback.format_exc()
    message = f"\n\n-- Process 1 terminated with the following error:\n{trace}\n"
    assert command_line.run(fail_with, torch.multiprocessing.ProcessRaisedException(message, 1, 4711)) == 1
    assert capsys.readouterr().err == "error: 7.png is broken: restore it\n"


def test_a_fault_in_one_of_several_processes_shows_its_trace():
    error = torch.multiprocessing.ProcessRaisedException("Traceback (most recent call last):\nKeyError: 'bug'", 1, 4711)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="bug"):
        command_line.run(fail_with, error)


def test_a_killed_process_is_reported(capsys):
    reason = "process 1 terminated with signal SIGKILL"
    error = torch.multiprocessing.ProcessExitedException(reason, 1, 4711, exit_code=-9, signal_name="SIGKILL")
    assert command_line.run(fail_with, error) == 1
    assert capsys.readouterr().err.startswith(f"error: {reason} (out of memory?)")


@pytest.mark.parametrize(
    "error, message", [(ValueError("a: b"), "a: b"), (CheckpointError("a\n  b\n  c"), "a\n  b\n  c")]
)
def test_a_trace_from_another_process_is_its_last_message(error, message):
    try:
        raise error
    except (ValueError, CheckpointError):
        trace = f"\n\n-- Process 1 terminated with the following error:\n{traceback.format_exc()}"
    assert command_line._last_exception(trace) == (type(error), message)


def test_the_trace_of_a_mistake_goes_to_the_log_file_alone(tmp_path, capsys):
    logger = logging.getLogger("detectron2")
    level, handlers = logger.level, list(logger.handlers)
    args = command_line.argument_parser("").parse_args(["--config-file", "c.yaml"])
    with open(tmp_path / "log.txt", "w") as file:
        logger.handlers[:] = [logging.StreamHandler(file), logging.StreamHandler(command_line.sys.stdout)]
        try:
            assert command_line.run(command_line.launch, read_nothing, args) == 1
        finally:
            logger.handlers[:], logger.level = handlers, level
    out, err = capsys.readouterr()
    assert "read_nothing" in (tmp_path / "log.txt").read_text()
    assert err == "error: there is nothing to read\n" and out == ""


def read_nothing(args):
    raise ValueError("there is nothing to read")


def carriers() -> int:
    """The communication threads of this process."""
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc, which is Linux's")
def test_no_thread_of_the_run_is_left_at_its_end(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: None)
    during = []
    args = command_line.argument_parser("").parse_args(["--config-file", "c.yaml"])
    command_line.launch(lambda args: during.append(carriers()), args)
    assert during[0] > 0 and carriers() == 0
    assert not torch.distributed.is_initialized()


HALF_FREED = """
import sys, torch
from eco_m2f.engine.command_line import give_back_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "give back":
    give_back_freed_memory()
first = torch.ones(2**22)
del first  # 16 MB, by which glibc learns to keep blocks of that size
blocks = [torch.ones(2**20) for _ in range(50)]  # 4 MB each
before = resident()
del blocks[::2]
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this option")
@pytest.mark.parametrize("gives_back", [True, False])
def test_freed_blocks_go_back_if_asked(gives_back):
    """Frees a hundred megabytes, in every second block."""
    done = subprocess.run(
        [sys.executable, "-c", HALF_FREED, "give back" if gives_back else "keep"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (float(done.stdout) > 90) == gives_back

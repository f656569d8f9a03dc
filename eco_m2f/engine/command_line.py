"""The command lines of the tools: common options, starting processes, and one message per input error.

PyTorch and detectron2 are loaded where they are used. `--help` and the workers of a tool need neither.
"""

import argparse
import ctypes
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..checkpoint.errors import CheckpointError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and shows defaults."""


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The options of every tool that runs a model: config, processes, machines and KEY VALUE pairs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="YAML file, see configs/")
    add("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine, on the CPU if there is no GPU")
    add("--num-machines", type=int, default=1, metavar="N", help="number of machines")
    add("--machine-rank", type=int, default=0, metavar="I", help="rank of this machine, from 0")
    add("--dist-url", default="auto", help="address of the machine of rank 0, tcp://host:port; auto for one machine")
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options, e.g. MODEL.WEIGHTS model.pth")
    return parser


def converter_parser(description: str, suffix: str) -> argparse.ArgumentParser:
    """The options of a tool that converts a published file to one of this suffix: source and target."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the published .pth file")
    parser.add_argument("target", type=Path, help=f"the {suffix} file to write")
    return parser


def launch(main: Callable, args: argparse.Namespace) -> None:
    """Calls main(args) in every process of a run, over NCCL with GPUs, else over gloo on the CPU.

    Under torchrun (RANK and WORLD_SIZE are set) the processes exist already. Otherwise --num-gpus of them start here.
    Raises ValueError for options that contradict each other or the machine.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _join_processes(args)
        _work(main, args)
        return
    _check_processes(args)
    from detectron2.engine import launch as detectron2_launch

    detectron2_launch(_work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(main, args))


def _check_processes(args: argparse.Namespace) -> None:
    import torch

    if args.num_gpus < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} --machine-rank {args.machine_rank}: "
            "--num-gpus must be at least 1, and the rank must lie below the number of machines"
        )
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and args.num_gpus > gpus:
        raise ValueError(f"--num-gpus {args.num_gpus} is more than this machine's {gpus}: give {gpus} at most")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError("--num-machines needs --dist-url tcp://host:port; host is the machine of rank 0")


def _join_processes(args: argparse.Namespace) -> None:
    """Joins the process group of torchrun."""
    import torch
    from detectron2.utils import comm

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in names if not os.environ.get(name)]
    if absent:
        raise ValueError(f"RANK and WORLD_SIZE are set as by torchrun, but not {', '.join(absent)}: set all or none")
    if args.num_gpus != 1 or args.num_machines != 1:
        raise ValueError("torchrun has started the processes: leave --num-gpus and --num-machines to it")
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])))
    comm.synchronize()


def _leave_processes() -> None:
    """Leaves the process group, which ends its communication threads.

    A thread that still runs when the interpreter shuts down can crash the process after all work is done ("terminate
    called without an active exception"). detectron2 keeps a reference to the local group, so it is removed too.
    """
    import torch
    from detectron2.utils import comm

    torch.distributed.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of freed tensors for the next ones. Does nothing with another C library.

    By default large blocks go back to the system when they are freed. Then each training step maps and zeroes them
    again, which takes a seventh of a step of the toy model.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
    _tell_malloc((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Tells glibc to give freed blocks of four megabytes and more back to the system: the opposite.

    By default this threshold grows with the freed blocks, up to 32 MB. A job with blocks of many sizes then takes more
    memory: half a gigabyte for a frontier of gates.
    """
    M_MMAP_THRESHOLD = -3  # malloc.h
    _tell_malloc((M_MMAP_THRESHOLD, 2**22))


def _tell_malloc(*options: tuple[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options:
            mallopt(option, value)


# Errors of input, which end in a message. Any other error is a bug and shows its trace.
MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, CheckpointError)


def _work(main: Callable, args: argparse.Namespace) -> None:
    """Runs main in one process. The trace of an input error goes to its log."""
    import torch

    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        main(args)
    except MISTAKES:
        _log_trace()
        raise
    if torch.distributed.is_initialized():
        _leave_processes()


def run(function: Callable, *args) -> int:
    """Calls a tool's function. Returns the exit status: the function's result, or 0 if that is None.

    An input error ends in one message, without a stack trace. The trace goes to OUTPUT_DIR/log.txt.
    """
    try:
        return function(*args) or 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again (train_net.py: with --resume) to go on", file=sys.stderr)
        return 130
    except MISTAKES as error:
        print(f"error: {_last_exception(str(error))[1]}", file=sys.stderr)
        return 1
    except Exception as error:
        message = _told_of_a_process(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1


def _told_of_a_process(error: Exception) -> str | None:
    """The message where one of several processes made a mistake or was killed; None for a fault of the program."""
    processes = sys.modules.get("torch.multiprocessing")  # else there were none
    if processes and isinstance(error, processes.ProcessRaisedException):
        kind, message = _last_exception(str(error))
        return message if issubclass(kind, MISTAKES) else None
    if processes and isinstance(error, processes.ProcessExitedException):
        return f"{error} (out of memory?); run the same command again to go on"
    return None


def _last_exception(text: str) -> tuple[type, str]:
    """Kind and message of the exception at the end of another process's trace. Text without a trace is the message.

    Further lines of a message are indented, so the message starts at the last line without indent.
    """
    if "Traceback (most recent call last)" not in text:
        return Exception, text
    lines = text.rstrip().splitlines()
    first = max(i for i, line in enumerate(lines) if line[:1].strip())
    name, _, message = "\n".join(lines[first:]).partition(": ")
    known = {f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."): kind for kind in _all_kinds(MISTAKES)}
    return known.get(name, Exception), message


def _all_kinds(kinds: Sequence[type]) -> list[type]:
    return [k for kind in kinds for k in (kind, *_all_kinds(kind.__subclasses__()))]


def hide_training_trace() -> None:
    """Stops detectron2 from logging the trace of an input error in training. `run` prints its message."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_mistake)


def _is_no_mistake(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], MISTAKES))


def _log_trace() -> None:
    """Writes the trace of the current exception to the log files only."""
    d2 = logging.getLogger("detectron2")
    record = d2.makeRecord(d2.name, logging.DEBUG, "", 0, "stopped by", (), sys.exc_info())
    for handler in d2.handlers:
        if getattr(handler, "stream", sys.stdout) not in (sys.stdout, sys.stderr):
            handler.handle(record)

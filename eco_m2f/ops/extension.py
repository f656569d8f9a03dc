"""Finds and loads the compiled kernels. Without them the package works too, but slower.

The shared library holds only `TORCH_LIBRARY_IMPL` registrations. Once it is loaded, PyTorch's dispatcher prefers its
kernels over the PyTorch reference, per device.
"""

import os
from pathlib import Path

import torch

BUILD_COMMAND = "ECO_M2F_BUILD=cpu pip install --no-build-isolation --no-deps -e .   (or ECO_M2F_BUILD=cuda)"
DISABLE_VARIABLE = "ECO_M2F_DISABLE_EXTENSION"


def extension_path() -> Path | None:
    """The path of the compiled library; None if nothing was built."""
    found = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(Path(__file__).parent.glob("_C*.pyd"))
    return found[0] if found else None


def load_extension() -> bool:
    """Registers the compiled kernels and returns whether there are any.

    Raises:
        ImportError: this PyTorch cannot load the library, for instance after an upgrade of PyTorch.
    """
    path = extension_path()
    if path is None or os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"{path} was not built for the installed PyTorch {torch.__version__} ({error}). Rebuild it with "
            f"`{BUILD_COMMAND}`, delete it, or set {DISABLE_VARIABLE}=1 to run on the slower PyTorch reference."
        ) from error
    return True


def compiled_backends() -> tuple[str, ...]:
    """The devices with compiled kernels: a subset of ("cpu", "cuda")."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(key.lower() for key in ("CPU", "CUDA") if has_kernel("eco_m2f::ms_deform_attn", key))


def build_info() -> str:
    """A paragraph for people: the kernels of each device, and how to build missing ones."""
    path, backends = extension_path(), compiled_backends()
    lines = [f"PyTorch {torch.__version__}, CUDA of PyTorch {torch.version.cuda}"]
    lines.append(f"compiled library: {path or 'none'}")
    if path is not None and not backends:
        lines.append(f"not loaded, because {DISABLE_VARIABLE} is set")
    for name in ("cpu", "cuda"):
        lines.append(f"ms_deform_attn on {name}: {'compiled kernel' if name in backends else 'PyTorch reference'}")
    if len(backends) < 2:
        lines.append(f"to build what is missing, in the checkout: {BUILD_COMMAND}")
    return "\n".join(lines)

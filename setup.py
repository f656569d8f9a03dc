"""Installs eco_m2f and compiles the kernels of its deformable attention.

The environment variable ECO_M2F_BUILD says what to compile:
    auto (default)  the CPU kernels, and the CUDA kernels where PyTorch has CUDA and nvcc is found
    cpu | cuda      as named (cuda includes cpu); an error where it cannot be done
    none            nothing: the package then runs on the PyTorch reference of the op
TORCH_CUDA_ARCH_LIST overrides the GPU architectures (default: 8.0 8.6 9.0+PTX).
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SOURCES = Path("eco_m2f/ops/csrc")  # relative: setuptools refuses absolute paths
CUDA_ARCHITECTURES = "8.0 8.6 9.0+PTX"


def version() -> str:
    return re.search(r'__version__ = "(.+?)"', (ROOT / "eco_m2f/__init__.py").read_text()).group(1)


def wants_cuda(mode: str) -> bool:
    """Whether to compile for CUDA; raises where that was asked for and cannot be done."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    possible = torch.version.cuda is not None and CUDA_HOME is not None and any(SOURCES.glob("cuda/*.cu"))
    if mode == "cuda" and not possible:
        raise SystemExit(
            f"ECO_M2F_BUILD=cuda needs a PyTorch with CUDA (found {torch.__version__}) and nvcc (CUDA_HOME is "
            f"{CUDA_HOME}). Install both, or build with ECO_M2F_BUILD=cpu."
        )
    return possible and mode in ("auto", "cuda")


def bundled_cuda_includes() -> list[str]:
    """The CUDA headers that PyTorch's wheels bring along, for a toolkit that lacks some (cuSPARSE, cuBLAS, ...)."""
    import torch

    return [str(path) for path in Path(torch.__file__).parents[1].glob("nvidia/cu*/include")]


def extensions() -> list:
    mode = os.environ.get("ECO_M2F_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"ECO_M2F_BUILD is {mode!r}, expected auto, cpu, cuda or none")
    if mode == "none":
        return []
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # No contraction into fused multiply-adds: all backends must compute the same pixel coordinate.
    flags = {"cxx": ["-O3", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden", "-g0"]}
    sources = sorted(str(path) for path in SOURCES.glob("cpu/*.cpp"))
    if not wants_cuda(mode):
        return [CppExtension("eco_m2f.ops._C", sources, extra_compile_args=flags)]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    flags["nvcc"] = ["-O3", "-std=c++17", "--threads=2"]
    sources += sorted(str(path) for path in SOURCES.glob("cuda/*.cu"))
    includes = bundled_cuda_includes()
    return [CUDAExtension("eco_m2f.ops._C", sources, include_dirs=includes, extra_compile_args=flags)]


def build_commands() -> dict:
    if os.environ.get("ECO_M2F_BUILD", "auto") == "none":
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension}


setup(
    name="eco_m2f",
    version=version(),
    description="Mask2Former whose transformer encoder each image may leave early (ECO-M2F)",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=("eco_m2f", "eco_m2f.*")),
    package_data={"eco_m2f": ["**/*.yaml", "**/*.json", "**/*.csv"]},
    ext_modules=extensions(),
    cmdclass=build_commands(),
    zip_safe=False,
    # detectron2 and panopticapi are needed too, but are not on the package index under these names (see the README).
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.24",
        "scipy>=1.9",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "pycocotools>=2.0.6",
        "opencv-python>=4.6",
        "pillow>=9.2",
        "pyarrow>=12",
        "matplotlib>=3.6",
        "safetensors>=0.4",
        "tqdm>=4.62",
    ],
)

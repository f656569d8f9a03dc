"""Installs eco_m2f and compiles the kernels of its deformable attention.

The environment variable ECO_M2F_BUILD chooses what to compile:
    auto (default)  the CPU kernels, and the CUDA kernels if PyTorch has CUDA and nvcc is found
    cpu | cuda      these kernels (cuda includes cpu), or an error if that is impossible
    none            nothing; the package then uses the op's PyTorch reference
TORCH_CUDA_ARCH_LIST overrides the GPU architectures (default: 8.0 8.6 9.0+PTX).
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SOURCES = Path("eco_m2f/ops/csrc")  # relative: setuptools refuses absolute paths
CUDA_ARCHITECTURES = "8.0 8.6 9.0+PTX"
NVCC = "nvcc.exe" if os.name == "nt" else "nvcc"


def version() -> str:
    return re.search(r'__version__ = "(.+?)"', (ROOT / "eco_m2f/__init__.py").read_text()).group(1)


def set_cuda_home() -> None:
    """Sets CUDA_HOME, unless it is set, to the toolkit of the nvcc on PATH. nvcc may be a wrapper, so this asks it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if top and (Path(top.group(1)) / "include" / "cuda_runtime.h").exists():
        os.environ["CUDA_HOME"] = str(Path(top.group(1)).resolve())


def missing_for_cuda() -> str:
    """Why it is impossible to compile for CUDA; "" if it is possible."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} has no CUDA"
    for part in (f"bin/{NVCC}", "include/cuda_runtime.h"):
        if CUDA_HOME is None or not (Path(CUDA_HOME) / part).exists():
            return f"no {part} of a CUDA toolkit (CUDA_HOME is {CUDA_HOME})"
    return ""


def wants_cuda(mode: str) -> bool:
    """Whether to compile for CUDA; also prints it. Raises SystemExit if CUDA is required and impossible."""
    missing = missing_for_cuda() if mode in ("auto", "cuda") else f"ECO_M2F_BUILD={mode}"
    if missing and mode == "cuda":
        raise SystemExit(
            f"ECO_M2F_BUILD=cuda is impossible: {missing}. Install a PyTorch with CUDA and a CUDA toolkit of its "
            "major version, or build with ECO_M2F_BUILD=cpu."
        )
    print(f"eco_m2f: building the CPU kernels {'alone: ' + missing if missing else 'and the CUDA kernels'}", flush=True)
    return not missing


def extensions() -> list:
    mode = os.environ.get("ECO_M2F_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"ECO_M2F_BUILD is {mode!r}: set it to auto, cpu, cuda or none")
    if mode == "none":
        return []
    set_cuda_home()  # before PyTorch guesses it
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # Without fused multiply-adds, so that all backends compute the same pixel coordinate. PyTorch adds the C++ standard
    # that its headers need: C++17, and C++20 in later versions.
    flags = {"cxx": ["-O3", "-ffp-contract=off", "-fopenmp", "-fvisibility=hidden", "-g0"]}
    sources = sorted(str(path) for path in SOURCES.glob("cpu/*.cpp"))
    if not wants_cuda(mode):
        return [CppExtension("eco_m2f.ops._C", sources, extra_compile_args=flags)]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    flags["nvcc"] = ["-O3", f"--threads={min(4, int(os.environ.get('MAX_JOBS', 4)))}"]
    sources += sorted(str(path) for pattern in ("cuda/*.cpp", "cuda/*.cu") for path in SOURCES.glob(pattern))
    return [CUDAExtension("eco_m2f.ops._C", sources, extra_compile_args=flags)]


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
    python_requires=">=3.11",
    packages=find_packages(include=("eco_m2f", "eco_m2f.*")),
    package_data={"eco_m2f": ["**/*.yaml", "**/*.json", "**/*.csv"]},
    ext_modules=extensions(),
    cmdclass=build_commands(),
    zip_safe=False,
    # detectron2 and panopticapi are also needed, but the package index has them under other names (see the README).
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.24",
        "scipy>=1.9",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "msgspec>=0.18",
        "pycocotools>=2.0.6",
        "opencv-python>=4.6",
        "pillow>=9.2",
        "pyarrow>=12",
        "matplotlib>=3.6",
        "safetensors>=0.4",
        "tqdm>=4.62",
    ],
    extras_require={"timm": ["timm>=1.0"]},
)

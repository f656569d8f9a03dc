"""The package imports and runs without its optional dependencies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eco_m2f.requirements import HOW_TO_INSTALL, require

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("cv2", "panopticapi", "timm")
BLOCK = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A copy of the package's Python files, like a checkout without compiled kernels."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(ROOT / "eco_m2f", folder / "eco_m2f", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return folder


def run_bare(bare: Path, code: str) -> subprocess.CompletedProcess:
    """Runs code with this copy, without a GPU and without the optional packages."""
    environment = os.environ | {"PYTHONPATH": str(bare), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCK + code]
    return subprocess.run(command, env=environment, cwd=bare, capture_output=True, text=True)


COMPUTE = """
import eco_m2f, torch
import eco_m2f.config, eco_m2f.derived, eco_m2f.exits, eco_m2f.gates.search, eco_m2f.modeling
from eco_m2f.ops import ms_deform_attn
from eco_m2f.ops.extension import compiled_backends
assert compiled_backends() == (), compiled_backends()
locations, weights = torch.full((1, 5, 2, 1, 4, 2), 0.5), torch.full((1, 5, 2, 1, 4), 0.25)
out = ms_deform_attn(torch.ones(1, 4, 2, 3), [(2, 2)], locations, weights)
assert torch.allclose(out, torch.ones(1, 5, 6)), out
print("computed in", eco_m2f.__file__)
"""


DISTORT = """
import numpy
from eco_m2f.data.transforms import ColorDistortion
ColorDistortion(saturation=1.2).apply_image(numpy.zeros((4, 4, 3), numpy.uint8))
"""


@pytest.fixture(scope="module")
def computed(bare) -> subprocess.CompletedProcess:
    """One process, whose imports take seconds: what can be done there, and then what cannot."""
    return run_bare(bare, COMPUTE + DISTORT)


def test_imports_and_computes_without_extension_gpu_and_optional_packages(bare, computed):
    assert f"computed in {bare}" in computed.stdout, computed.stderr


WITHOUT = ("detectron2", "pycocotools")
LIGHT = f"""
import sys
import eco_m2f.derived.locking, eco_m2f.gates.search, eco_m2f.gates.file, eco_m2f.quality
from eco_m2f.quality import QUALITY_REGISTRY, quality_named
assert quality_named("PQ").columns and len(dict(QUALITY_REGISTRY)) > 3
heavy = sorted(name for name in sys.modules if name.split(".")[0] in {WITHOUT})
assert not heavy, heavy
"""


def test_gates_and_derived_datasets_need_neither_detectron2_nor_pycocotools(bare):
    done = run_bare(bare, LIGHT)
    assert done.returncode == 0, done.stderr


def test_colour_distortion_says_that_it_needs_opencv(computed):
    assert computed.returncode == 1
    assert "needs cv2: pip install opencv-python" in computed.stderr


@pytest.mark.parametrize("package", HOW_TO_INSTALL)
def test_require_names_what_is_missing_and_how_to_get_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    with pytest.raises(ImportError) as error:
        require(package, "this test")
    assert str(error.value).startswith(f"this test needs {package}: {HOW_TO_INSTALL[package]} (")


def test_require_returns_the_module():
    assert require("json", "this test").loads("[1]") == [1]

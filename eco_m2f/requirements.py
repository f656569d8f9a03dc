"""Imports on demand: packages that only some parts need, and the names of a room.

If a package is missing, the error says how to install it.
"""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType

HOW_TO_INSTALL = {
    "cv2": "pip install opencv-python (on a machine without libGL: opencv-python-headless)",
    "detectron2": "python tools/install_detectron2.py",
    "panopticapi": "pip install --no-deps panopticapi-lite",
    "timm": "pip install timm",
}


def require(module: str, purpose: str) -> ModuleType:
    """Imports an optional package, for example require("cv2", "INPUT.COLOR_AUG_SSD").

    Raises:
        ImportError: it is missing. The message says what needs it, how to install it, and the first cause.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        remedy = HOW_TO_INSTALL.get(package, f"pip install {package}")
        raise ImportError(f"{purpose} needs {package}: {remedy} ({error})", name=package) from error


def load_on_first_use(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose names are imported when they are first used.

    homes: {name: its module, relative to the package}, for example {"DerivedDataset": ".dataset"}.
    """

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name], package), name)

    return load

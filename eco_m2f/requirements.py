"""Imports packages that only some parts need. If one is missing, the error says how to install it."""

import importlib
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

"""zfcore shows what a convolutional network has learned: deconvnet projections and occlusion maps.

Paper: Zeiler & Fergus, Visualizing and Understanding Convolutional Networks, arXiv:1311.2901.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

# Where each public name lives. They are loaded at first use, so that `import zfcore` stays quick and never
# touches a GPU.
_PUBLIC = {
    "deconv_project": "zfcore.deconvnet",
    "iter_projections": "zfcore.deconvnet",
    "Projection": "zfcore.deconvnet",
    "occlusion_map": "zfcore.occlusion",
    "Occlusion": "zfcore.occlusion",
    "backends": "zfcore.ops",
    "use_backend": "zfcore.ops",
    "ZfcoreError": "zfcore.errors",
    "UnsupportedOperation": "zfcore.errors",
}
_SUBMODULES = ("data", "errors", "models", "network", "ops", "reference", "report", "train")

try:
    __version__ = version("zfcore")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

__all__ = [*_PUBLIC, *_SUBMODULES, "__version__"]


def __getattr__(name):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"zfcore.{name}")
    raise AttributeError(f"module 'zfcore' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})

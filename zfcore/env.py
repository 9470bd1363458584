"""What this install is: ``python -m zfcore.env`` prints it, for bug reports and for checking a deployment."""

import importlib
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("torch", "triton", "numpy", "pillow", "tqdm", "safetensors", "captum", "torchvision")


def _package(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def report() -> str:
    """Versions, CPU features, what the native core was built with, and each backend with the reason when missing."""
    import torch

    from zfcore.ops import backends

    lines = [
        f"zfcore      {_package('zfcore')}",
        f"python      {platform.python_version()} on {platform.system()} {platform.machine()}",
    ]
    lines += [f"{name:<11} {_package(name)}" for name in _PACKAGES]
    lines.append(f"threads     {torch.get_num_threads()} (torch.get_num_threads())")
    try:
        native = importlib.import_module("zfcore._C")
    except ImportError as error:
        lines.append(f"native core zfcore._C does not load: {error}")
    else:
        build = native.build_info()
        features = [name for name, present in native.cpu_features().items() if present]
        lines += [
            f"native core {build['version']}, {build['build_type']}, compiler {build['compiler']}, "
            f"{'OpenMP' if build['openmp'] else 'std::thread'}"
            + (f", sanitizers {build['sanitize']}" if build["sanitize"] else ""),
            f"CPU         features {', '.join(features) or 'none that matter'}; kernels built {build['isas']}; "
            f"in use {native.cpu_isa()}",
        ]
        if build["with_cuda"]:
            lines.append(f"CUDA        built with {build['cuda_version']} for {build['cuda_architectures']}")
        else:
            lines.append("CUDA        the native core was built without CUDA")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"GPU {index}       {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    else:
        lines.append("GPU         none that torch can use")
    lines.append("backends")
    for name, status in backends().items():
        lines.append(f"  {name:<10}{'available' if status.available else f'missing: {status.reason}'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
    sys.exit(0)

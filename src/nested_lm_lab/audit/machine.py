"""What an audit ran on: versions of what computes, and the hardware."""

import os
import platform
from importlib.metadata import version

import torch


def package_versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that make numbers."""
    packages = ("torch", "numpy", "safetensors", "tokenizers")
    return {
        "nested-lm": version("nested-lm"),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def describe_hardware(device: torch.device) -> dict[str, str]:
    """Processor, threads and, where it computes, the GPU."""
    found = {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    return found

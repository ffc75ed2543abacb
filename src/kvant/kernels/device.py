"""Which device computes, and what an NVIDIA GPU is good for."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import torch

from kvant.errors import ConfigError

logger = logging.getLogger("kvant")

TRITON_CAPABILITY = (8, 0)  # Triton has no support for what came before
TRITON_VERSION = (3, 6)  # the oldest that kernels are compiled with in tests
LOWEST_CAPABILITY = (7, 0)
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def find_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:1" means here; "auto" takes a GPU that can be used.

    Raises:
        ConfigError: it is none of these, or PyTorch cannot use it; with the cause and what to do.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f"device={name!r} is unknown; use 'cpu', 'cuda', 'cuda:1' or 'auto'")
    if name == "cpu":
        return torch.device("cpu")
    problem = gpu_problem()
    if name == "auto":
        if problem is None:
            return _checked(torch.device("cuda", torch.cuda.current_device()))
        if _NVIDIA_DRIVER.exists():
            logger.warning("there is an NVIDIA driver, but the CPU computes: %s", problem)
        return torch.device("cpu")
    if problem is not None:
        raise ConfigError(f"device={name!r}: {problem}; device='cpu' needs none of it")
    index = int(name.partition(":")[2]) if ":" in name else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return _checked(torch.device("cuda", index))


def gpu_problem() -> str | None:
    """Why PyTorch cannot use a GPU here, and the remedy; None where it can."""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA; install a build with it from pytorch.org"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would warn of is said below
        if torch.cuda.is_available():
            return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().splitlines()[0]
        return (
            f"PyTorch {torch.__version__} needs a driver for CUDA {torch.version.cuda}, and cannot use this one "
            f"({said}); update the driver, or install a PyTorch that is built for an older CUDA"
        )
    return "PyTorch finds no GPU; `nvidia-smi` should list one, and CUDA_VISIBLE_DEVICES must not hide it"


def _checked(device: torch.device) -> torch.device:
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has compute capability {_dotted(capability)}; "
            f"{_dotted(LOWEST_CAPABILITY)} is the least that is supported; use device='cpu'"
        )
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU the calling thread's current one: launches, streams, events and graphs are made there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def runs_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on a GPU; where they do not, a warning says why and what that means."""
    reason = _why_no_triton(torch.cuda.get_device_capability(device))
    if reason is None:
        return True
    logger.warning("%s computes with plain PyTorch, slowly: %s", torch.cuda.get_device_name(device), reason)
    return False


def check_triton() -> None:
    """That Triton can launch kernels: it compiles some C when it does so for the first time.

    Raises:
        ConfigError: it cannot, with the remedy.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_device()
    except Exception as error:  # no compiler, no headers, no place to write to
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"Triton cannot launch kernels here ({said[0]}); it needs a C compiler and Python's headers (packages gcc "
            "and python3-dev), and a directory that it can write to, TRITON_CACHE_DIR; device='cpu' needs none of it"
        ) from error


def _why_no_triton(capability: tuple[int, int]) -> str | None:
    if capability < TRITON_CAPABILITY:
        return f"its compute capability is {_dotted(capability)}, Triton's kernels need {_dotted(TRITON_CAPABILITY)}"
    try:
        import triton
    except ImportError:
        return "Triton is not installed; `pip install kvant[gpu]`"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < TRITON_VERSION:
        needed = _dotted(TRITON_VERSION)
        return f"Triton is {triton.__version__}, its kernels need {needed}; PyTorch 2.10 and later bring it"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"

"""A second torch device for tests on machines that have only a CPU.

Its memory is the machine's own, each operator runs on the CPU, and an operator that
gets tensors of both devices fails as on a real one. It is compiled when it is first
asked for, which takes a minute and needs a C++ compiler.
"""

import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

NAME = "second"
GENERATOR = torch.Generator()
"""Stands for the device's own generator, so that a test can see it seeded."""


def start(build_folder: Path) -> torch.device:
    """Compile and register the device in this process, which keeps it."""
    from torch.utils.cpp_extension import load  # noqa: PLC0415 - looks for compilers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extension = load(
            name="second_device",
            sources=[str(Path(__file__).with_name("second_device.cpp"))],
            extra_cflags=["-O0"],
            build_directory=str(build_folder),
        )
    extension.start()
    torch.utils.rename_privateuse1_backend(NAME)
    module = SimpleNamespace(
        default_generators=(GENERATOR,),
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda device=None: None,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.device(NAME, 0)

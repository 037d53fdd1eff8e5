"""The settings of torch, for the whole process, that change numbers."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from flwr_smartsplit.split.fake_tensors import warnings_ignored

_MIXED = "set in parts"


# Some versions of torch warn of the older name of a setting, whoever reads it.
@warnings_ignored()
def torch_settings() -> dict[str, Any]:
    """Read the process-wide settings of torch that change numbers."""
    return {name: get() for name, get, _ in _settings()}


@warnings_ignored()
def apply_torch_settings(settings: Mapping[str, Any]) -> None:
    """Set this process as another one is set, as far as torch can be set from here."""
    for name, get, put in _settings():
        value = settings.get(name, _MIXED)
        if value != _MIXED and get() != value:
            put(value)


def _settings() -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], object]]]:
    """Yield each setting's name, and how to read and write it."""
    of = torch.backends
    yield "default_dtype", torch.get_default_dtype, torch.set_default_dtype
    yield (
        "deterministic_algorithms",
        torch.get_deterministic_debug_mode,
        torch.set_deterministic_debug_mode,
    )
    yield (
        "float32_matmul_precision",
        _matmul_precision,
        torch.set_float32_matmul_precision,
    )
    yield "flush_denormal", _flushes_denormal, torch.set_flush_denormal
    yield (
        "mkldnn.enabled",
        torch._C._get_mkldnn_enabled,
        torch._C._set_mkldnn_enabled,
    )
    yield (
        "mha_fastpath",
        of.mha.get_fastpath_enabled,
        of.mha.set_fastpath_enabled,
    )
    for kind in ("flash", "mem_efficient", "math"):
        read = getattr(of.cuda, f"{kind}_sdp_enabled")
        yield f"{kind}_attention", read, getattr(of.cuda, f"enable_{kind}_sdp")
    for name, default in _attributes():
        *path, last = name.split(".")
        owner: Any = of
        for part in path:
            owner = getattr(owner, part, None)
        yield (
            name,
            partial(getattr, owner, last, default),
            partial(setattr, owner, last),
        )


def _attributes() -> list[tuple[str, str]]:
    """List the settings that are attributes of ``torch.backends``, with defaults."""
    names = [f"mkldnn.{part}.fp32_precision" for part in ("matmul", "conv", "rnn")]
    found = [*((name, "none") for name in names), ("mkldnn.deterministic", "False")]
    if torch.cuda.is_available():
        found += [
            *((f"cudnn.{n}", "") for n in ("enabled", "benchmark", "deterministic")),
            *((f"cudnn.{n}.fp32_precision", "none") for n in ("conv", "rnn")),
            ("cuda.matmul.fp32_precision", "none"),
            ("cuda.matmul.allow_fp16_reduced_precision_reduction", ""),
            ("cuda.matmul.allow_bf16_reduced_precision_reduction", ""),
        ]
    return found


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # Set in part by torch's newer names, which are read below.
        return _MIXED


def _flushes_denormal() -> bool:
    tiny = torch.tensor(1e-310, dtype=torch.float64)
    return bool((tiny * 1 == 0).item())

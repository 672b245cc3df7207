"""Which device and which precision, and why. Knows the machine; knows nothing of checkpoints."""

from typing import NamedTuple

import torch

from .int8 import can_multiply_int8

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
"""What torch says when Apple's GPU, the CPU's allocator on Linux and on Windows, or one of CUDA's libraries finds no memory."""


class Precision(NamedTuple):
    """A precision of weights and the reason for it, in words for `bge-rerank info`. States are float32 where weights are int8."""

    dtype: torch.dtype
    reason: str


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or by default the one best device of the machine.

    Raises:
        ValueError: The device is not there; the message lists those that are.
    """
    available = available_devices()
    if name is None:
        return torch.device(available[0])
    device = torch.device(name)
    if device.type == "cpu":
        return device
    device = torch.device(device.type, device.index or 0)
    if str(device) not in available:
        raise ValueError(f"device={name!r}: not on this machine, which has {', '.join(available)}")
    return device


def asked_devices(device: str | list[str] | None) -> list[str | None]:
    """The setting `device` as names for `choose_device`, one for each replica."""
    return [*device] if isinstance(device, list) else [device]


def available_devices() -> list[str]:
    """Devices of this machine, best first; the CPU is always there."""
    # A driver that is too old for torch counts its devices, and cannot use them.
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cuda":
        found += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    return [*found, "cpu"]


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device; None elsewhere, where memory is not the device's own."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def release_cached_memory() -> None:
    """Gives back what torch holds of the devices' memory and does not use."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return
    # Not by torch.accelerator.empty_cache, which before torch 2.13 raises on Apple's GPUs; and CUDA's does nothing where CUDA is
    # not in use yet, while to ask whether it is there may begin its use, for children of this process too.
    if accelerator.type == "cuda" or torch.accelerator.is_available():
        release = getattr(torch.get_device_module(accelerator), "empty_cache", None)
        if release is not None:  # not every kind of device has a cache
            release()


def is_out_of_memory(error: Exception) -> bool:
    """Whether something did not fit. torch has an error of its own for that on CUDA; elsewhere only the message tells."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def choose_precision(dtype: str, device: torch.device, *, float16_is_safe: bool) -> Precision:
    """Precision for `dtype` on `device`.

    Args:
        dtype: "auto", "fast" or the name of a precision.
        device: Where the model will run.
        float16_is_safe: Whether the family's hidden states stay inside float16 (65504); Gemma's do not.

    Raises:
        ValueError: "int8" elsewhere than on a CPU, or on one for which this torch does not have it.
    """
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(f"dtype='int8': for a CPU only, and the device is {device}; use 'fast'")
    if dtype == "int8" and not can_multiply_int8():
        raise ValueError("dtype='int8': this torch does not multiply such numbers on this processor; use 'float32'")
    if dtype not in ("auto", "fast"):
        return Precision(getattr(torch, dtype), "asked for")
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Precision(torch.bfloat16, "this GPU computes in bfloat16")
        if float16_is_safe:
            return Precision(torch.float16, "this GPU has no bfloat16")
        return Precision(torch.float32, "this GPU has no bfloat16, and this family overflows in float16")
    if dtype == "auto":
        return Precision(torch.float32, f"the exact choice on {device.type}")
    if device.type == "cpu":
        if cpu_has_bfloat16():
            return Precision(torch.bfloat16, "this processor multiplies bfloat16 (AVX512-BF16 or AMX)")
        faster = "; 'int8' is faster, if less exact" if can_multiply_int8() else ""
        return Precision(torch.float32, f"this processor has no bfloat16 arithmetic{faster}")
    if float16_is_safe:
        return Precision(torch.float16, f"float16 is the fast one on {device.type}")
    return Precision(torch.float32, "this family overflows in float16")


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; elsewhere it is emulated and slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))

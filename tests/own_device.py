"""A device of its own, played by the CPU: what a GPU would refuse or wait for is seen without one.

Importing this gives torch a device named "npu", through its hook for backends that are written in Python. A tensor there holds
one of the CPU, on which every operation is done, with the numbers that the CPU makes. An operation on tensors of both is an
error, as it is with a real device. What passes between the two is counted. For a process of its own, since torch cannot forget
a device.
"""

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _acc
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"

traffic: Counter[str] = Counter()
"""Tensors "sent" there and "read" from there, recordings "replayed"; and where the host waited for a number."""

NUMBERS_FOR_THE_HOST = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "unique_dim", "masked_select")
"""Operations whose result, or its size, the host must know to go on."""


class Recording:
    """The operations of a computation, to be done again on the same memory, as a CUDA graph does.

    Python is not asked again: a number that it knew while the operations were recorded stays what it was.
    """

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        before = traffic.copy()
        There.recording = self
        try:
            self.result = compute()
        finally:
            There.recording = None
        if traffic != before:
            raise RuntimeError(f"operation not permitted when stream is capturing: {traffic - before}")

    def add(self, operation: Any, arguments: Any, options: Any, made: Any) -> None:
        self._operations.append((operation, arguments, options, tensors(made)))

    def replay(self) -> Any:
        traffic["replayed"] += 1
        for operation, arguments, options, made in self._operations:
            for old, new in zip(made, tensors(operation(*arguments, **options)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)
        return self.result


class There(Tensor):
    """A tensor of the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    recording: Recording | None = None
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd")
        if composite and name != "pad_sequence":  # torch 2.11 cannot take that one apart
            return operation.decompose(*args, **kwargs)
        if name in NUMBERS_FOR_THE_HOST:
            ours = [frame.name for frame in traceback.extract_stack() if "bge_rerank_plugins" in frame.filename]
            traffic[f"waited in {ours[-1:]} for {name}"] += 1
        if name == "copy_":
            return copy_from(args[1], args[0])
        if name == "_to_copy" and torch.device(kwargs.get("device") or NAME).type == "cpu":
            traffic["read"] += 1
            options = {option: kwargs[option] for option in kwargs if option in ("dtype", "memory_format")}
            return operation(args[0].held, **options)

        given, structure = tree_flatten((args, kwargs))
        if any(isinstance(one, Tensor) and not isinstance(one, There) and one.dim() for one in given):
            raise RuntimeError(f"{operation}: tensors on the CPU and on {NAME}")
        arguments, options = tree_unflatten([here(one) for one in given], structure)
        made = operation(*arguments, **options)
        if cls.recording is not None:
            cls.recording.add(operation, arguments, options, made)
        known = {id(one.held): one for one in given if isinstance(one, There)}  # of operations in place

        def there(one: Any) -> Any:
            if not isinstance(one, Tensor):
                return one
            return known[id(one)] if id(one) in known else There(one)

        return tree_map(there, made)


def here(given: Any) -> Any:
    """What stands for an argument on the CPU."""
    if isinstance(given, There):
        return given.held
    return torch.device("cpu") if isinstance(given, torch.device) else given


def tensors(made: Any) -> list[Tensor]:
    return [one for one in tree_flatten(made)[0] if isinstance(one, Tensor)]


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, There):
        traffic["read"] += 1
        return target.copy_(here(source))
    if not isinstance(source, There):
        traffic["sent"] += 1
    elif There.recording is not None:
        There.recording.add(torch.ops.aten.copy_.default, (target.held, source.held), {}, target.held)
    target.held.copy_(here(source))
    return target


def empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return There(torch.empty(size, dtype=dtype))


def empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return There(torch.empty_strided(size, stride, dtype=dtype))


def arange(*bounds: Any, dtype: Any = None, **_: Any) -> Tensor:
    return There(torch.arange(*bounds, dtype=dtype))


class _Module:
    """What `torch.npu` is."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _Hooks(_acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, device_id: int) -> bool:
        return True


class _Guard(_acc.DeviceGuard):
    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.PrivateUse1


# A parameter's data cannot be exchanged for another tensor here.
torch.__future__.set_overwrite_module_params_on_conversion(True)
_setup_privateuseone_for_python_backend(NAME, _Module, _Hooks(), _Guard())
_library = torch.library.Library("aten", "IMPL")
for _name, _function in {
    "_copy_from": copy_from,
    "empty.memory_format": empty,
    "empty_strided": empty_strided,
    "arange": arange,
    "arange.start": arange,
    "arange.start_step": arange,
}.items():
    _library.impl(_name, _function, "PrivateUse1")


@torch.library.custom_op("own_device::varlen_attn", mutates_args=())
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: list[int],
) -> Tensor:
    """The kernel of torch 2.11 as one operation of the device; `max_q` and `max_k` may be more than the longest."""
    from test_attention import earlier_varlen

    longest = [int(bounds.diff().max()) for bounds in (cu_seq_q, cu_seq_k)]
    assert longest[0] <= max_q
    assert longest[1] <= max_k
    states = (states.float() for states in (query, key, value))
    left, right = window_size
    return earlier_varlen(*states, cu_seq_q, cu_seq_k, *longest, scale=scale, window_size=(left, right)).to(query.dtype)

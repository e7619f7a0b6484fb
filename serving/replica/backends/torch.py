"""The Torch backend: `.pt2` (torch.export) and TorchScript. Only `torch*` here import torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from serving.artifacts import EXPORT_PLATFORM
from serving.core.types import Batch, Signature, TensorSpec
from serving.errors import ArtifactError, DeviceError, ServingError
from serving.replica.backends.base import (
    Array,
    RuntimeOptions,
    as_raw,
    does_not_fit,
    one_line,
)
from serving.replica.backends.cuda import context_fault
from serving.replica.backends.faults import (
    FatalDeviceError,
    MemoryExhausted,
    meaning,
    refused_shape,
)
from serving.replica.backends.meters import Meter
from serving.replica.backends.torch_cuda import (
    TorchMeter,
    choose_device,
    limit_allocator,
    refusals,
)

if TYPE_CHECKING:
    import torch

# torch dtype name → datatype.
_DATATYPES: Final[Mapping[str, str]] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
}
_DTYPES: Final = {datatype: name for name, datatype in _DATATYPES.items()}
_FLOATS: Final = frozenset({"FP16", "FP32", "FP64", "BF16"})


class TorchBackend:
    """One module in inference mode.

    Without a signature a `.pt2`'s own graph signature stands in; TorchScript does not record one.
    On a GPU inputs and outputs go through pinned memory, on a stream of this backend's own.
    """

    def __init__(
        self, model: Path, platform: str, options: RuntimeOptions, signature: Signature | None
    ) -> None:
        import torch

        self._torch = torch
        self.platform = platform
        self.device = choose_device(options)
        if threads := options.torch.get("threads", 1):
            torch.set_num_threads(threads)
        self._cast = _named_dtype(options.torch.get("dtype"))
        self.precision = _precision(self.device, options.torch.get("dtype"))
        self.meter: Meter | None = None
        if self.device != "cpu":
            self.meter = TorchMeter(options.memory_limit_bytes)
            limit_allocator(self.meter)
        loaded = self._load(model, options)
        self._call, self._module, declared = loaded.call, loaded.module, loaded.declared
        if signature is None and declared is None:
            raise ArtifactError(
                f"{model}: TorchScript does not record its inputs; give a sample or a signature"
            )
        if signature is not None:
            _check(model, signature, declared)
        self.signature: Signature = signature or declared  # type: ignore[assignment]
        self._refusals = 0
        self._stream = torch.cuda.Stream(self.device) if self.device != "cpu" else None
        self.check()

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Backend.run`."""
        try:
            outputs = self._run(inputs)
        except Exception as error:
            refused = self._memory_refused()
            fault = refused_shape(error) or meaning(error, self.device, refused=refused)
            if fault is None:
                raise
        else:
            return self._wire_form(outputs)
        # The error is gone, and with it the tensors that its frames held.
        if self._stream is not None and isinstance(fault, MemoryExhausted):
            self._torch.cuda.empty_cache()
        raise fault

    def check(self) -> None:
        """See `Backend.check`."""
        wanted = self.device.partition(":")[0]
        for name, tensor in _weights(self._module):
            if tensor.device.type != wanted:
                raise DeviceError(f"the weights {name!r} are on {tensor.device}, not {self.device}")
        if self.device != "cpu" and (reason := context_fault()):
            raise FatalDeviceError(f"{self.device} can run nothing more in this process: {reason}")

    def close(self) -> None:
        """See `Backend.close`."""
        del self._call, self._module

    def _memory_refused(self) -> bool:
        """Whether torch's allocator has refused memory since this was last asked."""
        if self.meter is None:
            return False
        before, self._refusals = self._refusals, refusals()
        return self._refusals > before

    def _load(self, model: Path, options: RuntimeOptions) -> _Loaded:
        """The model on its device. Raises `ArtifactError` and `DeviceError`."""
        load = _load_export if self.platform == EXPORT_PLATFORM else _load_script
        try:
            with _quiet():
                return load(model, self.device, self._cast, options)
        except ServingError:
            raise
        except Exception as error:
            fault = meaning(error, self.device)
            if isinstance(fault, MemoryExhausted) and self.meter is not None:
                raise does_not_fit(model, self.meter, fault.requested_bytes) from error
            if isinstance(fault, FatalDeviceError):
                raise fault from error
            raise ArtifactError(f"{model}: torch cannot load it: {one_line(error)}") from error

    def _wire_form(self, outputs: list[torch.Tensor]) -> list[Array]:
        specs = self.signature.outputs
        if len(outputs) != len(specs):
            # The engine says so with the numbers; what there is needs no cast.
            return [self._to_numpy(out, None) for out in outputs]
        return [self._to_numpy(out, s.datatype) for out, s in zip(outputs, specs, strict=True)]

    def describe_outputs(self, inputs: Sequence[Array]) -> list[TensorSpec]:
        """Names, datatypes and shapes of what the model returns for `inputs`.

        Outputs are named after the keys of a returned mapping, else output0, output1, …
        """
        with self._torch.inference_mode(), _quiet():
            returned = self._call(self._to_tensors(inputs))
        named = returned.items() if isinstance(returned, Mapping) else enumerate(_flat(returned))
        return [
            TensorSpec(
                key if isinstance(key, str) else f"output{key}",
                _datatype(value.dtype, str(key)),
                tuple(value.shape),
            )
            for key, value in named
        ]

    def _run(self, inputs: Sequence[Array]) -> list[torch.Tensor]:
        """The outputs on the host."""
        torch = self._torch
        with torch.inference_mode():
            if self._stream is None:
                return list(_flat(self._call(self._to_tensors(inputs))))
            with torch.cuda.stream(self._stream):
                outputs = []
                for out in _flat(self._call(self._to_tensors(inputs))):
                    # From torch's caching host allocator, which hands a block out again only when
                    # it is free.
                    host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
                    outputs.append(host.copy_(out, non_blocking=True))
        self._stream.synchronize()
        return outputs

    def _to_tensors(self, inputs: Sequence[Array]) -> list[torch.Tensor]:
        torch = self._torch
        tensors = []
        for spec, array in zip(self.signature.inputs, inputs, strict=True):
            tensor = torch.from_numpy(array)
            if spec.datatype == "BF16":
                tensor = tensor.view(torch.bfloat16)
            if self._stream is not None:
                tensor = tensor.pin_memory().to(self.device, non_blocking=True)
            if self._cast is not None and spec.datatype in _FLOATS:
                tensor = tensor.to(self._cast)
            tensors.append(tensor)
        return tensors

    def _to_numpy(self, tensor: torch.Tensor, datatype: str | None) -> Array:
        torch = self._torch
        if self._cast is not None and datatype in _FLOATS and tensor.is_floating_point():
            # Clients see the signature's datatype, whatever the arithmetic is done in.
            tensor = tensor.to(getattr(torch, _DTYPES[datatype]))
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.contiguous().view(torch.uint16)
        return as_raw(np.asarray(tensor.numpy()))


def _precision(device: str, dtype: str | None) -> str:
    if dtype is not None and dtype != "float32":
        return _DATATYPES[dtype]
    # On Ampere and later cuDNN convolves FP32 in TF32 by default.
    return "FP32" if device == "cpu" else "TF32"


def _named_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


Call = Callable[[list["torch.Tensor"]], Any]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A callable over the flat inputs, the module behind it, and the graph's own signature."""

    call: Call
    module: torch.nn.Module
    declared: Signature | None


def _load_export(
    model: Path, device: str, cast: torch.dtype | None, options: RuntimeOptions
) -> _Loaded:
    import torch
    from torch.export.passes import move_to_device_pass

    # This unpickles. The file's digest was verified before (`load_backend`), or it is the
    # operator's own file on its way into the registry (`serving.replica.inspect`, in a child
    # process).
    program = torch.export.load(model)
    declared = _declared(model, program)
    if device != "cpu":
        program = move_to_device_pass(program, device)
    in_spec = program.call_spec.in_spec
    module = program.module()
    module = module.to(cast) if cast is not None else module
    run = torch.compile(module) if options.torch.get("compile") else module

    def call(tensors: list[torch.Tensor]) -> Any:
        args, kwargs = in_spec.unflatten(tensors)
        return run(*args, **kwargs)

    return _Loaded(call, module, declared)


def _load_script(
    model: Path, device: str, cast: torch.dtype | None, options: RuntimeOptions
) -> _Loaded:
    import torch

    if options.torch.get("compile"):
        raise ArtifactError(f"{model}: torch.compile does not take TorchScript; export a .pt2")
    module = torch.jit.load(str(model), map_location=device).eval()
    module = module.to(cast) if cast is not None else module

    def call(tensors: list[torch.Tensor]) -> Any:
        return module(*tensors)

    return _Loaded(call, module, None)


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def script_arguments(model: Path) -> list[str]:
    """The argument names of a TorchScript module's `forward`. Raises `ArtifactError`."""
    import torch

    with _quiet():
        try:
            module = torch.jit.load(str(model), map_location="cpu")
            return [argument.name for argument in module.forward.schema.arguments[1:]]
        except Exception as error:
            raise ArtifactError(f"{model}: torch cannot load it: {one_line(error)}") from error


def _declared(model: Path, program: torch.export.ExportedProgram) -> Signature:
    """Names, datatypes and shapes from the exported graph; symbolic dimensions become -1."""
    graph = program.graph_signature
    nodes = {node.name: node for node in program.graph.nodes}
    inputs = [_spec(model, name, nodes, name) for name in graph.user_inputs]
    keys = program.call_spec.out_spec.context if _returns_mapping(program) else None
    outputs = [
        _spec(model, name, nodes, str(keys[i]) if keys else f"output{i}")
        for i, name in enumerate(graph.user_outputs)
    ]
    return Signature(tuple(inputs), tuple(outputs), Batch.NONE)


def _returns_mapping(program: torch.export.ExportedProgram) -> bool:
    spec = program.call_spec.out_spec
    return spec.type is dict and spec.num_leaves == len(spec.context)


def _spec(model: Path, node: Any, nodes: Mapping[str, Any], name: str) -> TensorSpec:
    value: Any = nodes[node].meta.get("val") if node in nodes else None
    if not hasattr(value, "dtype"):
        raise ArtifactError(f"{model}: {name!r} is not a tensor, and only tensors can be served")
    shape = tuple(d if isinstance(d, int) else -1 for d in value.shape)
    return TensorSpec(name, _datatype(value.dtype, name), shape)


def _datatype(dtype: torch.dtype, name: str) -> str:
    short = str(dtype).removeprefix("torch.")
    if short not in _DATATYPES:
        raise ArtifactError(f"{name!r} is {dtype}: the protocol has no such datatype")
    return _DATATYPES[short]


def _check(model: Path, signature: Signature, declared: Signature | None) -> None:
    for spec in (*signature.inputs, *signature.outputs):
        if spec.datatype not in _DTYPES:
            raise ArtifactError(f"{model}: {spec.name!r} is {spec.datatype}, which torch has not")
    if declared is None:
        return
    for kind in ("inputs", "outputs"):
        ours = [t.datatype for t in getattr(signature, kind)]
        theirs = [t.datatype for t in getattr(declared, kind)]
        if ours != theirs:
            raise ArtifactError(f"{model}: its {kind} are {theirs}, its signature.json says {ours}")


def _flat(returned: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a module returned, in order."""
    if hasattr(returned, "dtype"):
        yield returned
    elif isinstance(returned, Mapping):
        for value in returned.values():
            yield from _flat(value)
    elif isinstance(returned, list | tuple):
        for value in returned:
            yield from _flat(value)
    else:
        raise TypeError(f"the model returned a {type(returned).__name__} where a tensor belongs")


@contextmanager
def _quiet() -> Iterator[None]:
    # torch warns that TorchScript is deprecated; whoever serves one knows.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

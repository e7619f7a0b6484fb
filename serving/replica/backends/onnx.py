"""The ONNX Runtime backend. Only the `onnx*` modules here import onnxruntime."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from serving.artifacts import ONNX_PLATFORM
from serving.core.types import DATATYPES, Batch, Signature, TensorSpec
from serving.errors import ArtifactError, DeviceError, InvalidRequest
from serving.replica.backends.base import (
    Array,
    RuntimeOptions,
    allocator_limit,
    as_raw,
    does_not_fit,
    one_line,
    require_loaded_within_limit,
)
from serving.replica.backends.cuda import context_fault, refused_by_runtime
from serving.replica.backends.faults import FatalDeviceError, MemoryExhausted, meaning
from serving.replica.backends.meters import DriverMeter, Meter
from serving.replica.backends.onnx_cuda import preload_libraries
from serving.replica.backends.onnx_providers import (
    PROVIDERS,
    RECORD_NODES,
    asked_for,
    choose_providers,
    log_nodes_on_cpu,
    with_options,
)

if TYPE_CHECKING:
    import onnxruntime as ort

_log = logging.getLogger(__name__)

# ONNX Runtime's name of an element type → (datatype, onnx.TensorProto.DataType).
_ELEMENT_TYPES: Final[Mapping[str, tuple[str, int]]] = {
    "tensor(float)": ("FP32", 1),
    "tensor(uint8)": ("UINT8", 2),
    "tensor(int8)": ("INT8", 3),
    "tensor(uint16)": ("UINT16", 4),
    "tensor(int16)": ("INT16", 5),
    "tensor(int32)": ("INT32", 6),
    "tensor(int64)": ("INT64", 7),
    "tensor(string)": ("BYTES", 8),
    "tensor(bool)": ("BOOL", 9),
    "tensor(float16)": ("FP16", 10),
    "tensor(double)": ("FP64", 11),
    "tensor(uint32)": ("UINT32", 12),
    "tensor(uint64)": ("UINT64", 13),
    "tensor(bfloat16)": ("BF16", 16),
}
# How ONNX Runtime refuses a run after which it was to shrink an arena that it does not find.
_NO_ARENA: Final = "in the memory arena shrink list"
_ONNX_TYPE: Final = dict(_ELEMENT_TYPES.values())


class OnnxBackend:
    """One `InferenceSession`. Without a signature the graph's own declaration stands in."""

    platform = ONNX_PLATFORM

    def __init__(self, model: Path, options: RuntimeOptions, signature: Signature | None) -> None:
        providers = choose_providers(options)
        on_gpu = providers[0] != PROVIDERS["cpu"]
        self.meter: Meter | None = DriverMeter(options.memory_limit_bytes) if on_gpu else None
        self._session = _open(model, options, providers, self.meter)
        self._provider = self._session.get_providers()[0]
        if self._provider == PROVIDERS["cpu"]:
            self.device, self.precision, self.meter = "cpu", "FP32", None
        else:
            # On Ampere and later the CUDA provider multiplies FP32 matrices in TF32 (use_tf32, on
            # by default).
            self.device, self.precision = "cuda:0", "TF32"
        declared = _declared(self._session, model)
        if signature is not None:
            _check(declared, signature, model)
        self.signature = signature or declared
        self._input_names = [t.name for t in declared.inputs]
        self._output_names = [t.name for t in declared.outputs]
        self._input_types = [t.datatype for t in declared.inputs]
        self._output_types = [t.datatype for t in declared.outputs]
        types = self._input_types + self._output_types
        self._plain = "BYTES" not in types and "BF16" not in types
        if "BYTES" in self._input_types and "BF16" in self._output_types:
            raise ArtifactError(
                f"{model}: BYTES inputs with BF16 outputs: ONNX Runtime's Python interface has no "
                "call that takes the one and gives the other"
            )
        self._run_options: ort.RunOptions | None = None
        self._can_shrink = True

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """See `Backend.run`."""
        try:
            return self._run_or_keep(inputs)
        except Exception as error:
            fault = meaning(error, self.device)
            if fault is None:
                raise
        if self.device != "cpu" and self._can_shrink and isinstance(fault, MemoryExhausted):
            self._shed()
        raise fault

    def check(self) -> None:
        """See `Backend.check`."""
        active = self._session.get_providers()[0]
        if active != self._provider:
            raise DeviceError(f"the model runs on {active}, it was loaded on {self._provider}")
        if self.device != "cpu" and (reason := context_fault()):
            raise FatalDeviceError(f"{self.device} can run nothing more in this process: {reason}")

    def close(self) -> None:
        """See `Backend.close`."""
        del self._session

    def _run_or_keep(self, inputs: Sequence[Array]) -> list[Array]:
        """`_run`; again with memory kept, where ONNX Runtime finds no arena to shrink after it."""
        try:
            return self._run(inputs)
        except Exception as error:
            if self._run_options is None or _NO_ARENA not in str(error):
                raise
        self._run_options, self._can_shrink = None, False
        _log.warning(
            "ONNX Runtime has no arena on the GPU that it could shrink: what a run has taken, this "
            "replica keeps"
        )
        return self._run(inputs)

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        # Inputs go to the device within the run, into the session's arena. An OrtValue made on the
        # device before would lie in one of the process, which knows no limit and is never shrunk.
        if self._plain:
            feed = dict(zip(self._input_names, inputs, strict=True))
            outputs: list[Array] = self._session.run(self._output_names, feed, self._run_options)
            return outputs
        return self._run_converted(inputs)

    def _shed(self) -> None:
        """Have the arena give back after each run from now on.

        An arena that ran full is in pieces, of which none may be large enough for a smaller run.
        """
        import onnxruntime as ort

        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")

    def _run_converted(self, inputs: Sequence[Array]) -> list[Array]:
        """Run with what numpy and ONNX Runtime do not share: BF16 as OrtValues, BYTES as text."""
        feed = {
            name: _converted(name, datatype, array)
            for name, datatype, array in zip(
                self._input_names, self._input_types, inputs, strict=True
            )
        }
        if "BF16" not in self._output_types:
            outputs = self._session.run(self._output_names, feed, self._run_options)
            return [
                _from_text(out) if datatype == "BYTES" else out
                for out, datatype in zip(outputs, self._output_types, strict=True)
            ]
        values = self._session.run_with_ort_values(self._output_names, feed, self._run_options)
        return [
            _from_text(v.numpy()) if t == "BYTES" else _copy_out(v, t)
            for v, t in zip(values, self._output_types, strict=True)
        ]


def _open(
    model: Path, options: RuntimeOptions, providers: Sequence[str], meter: Meter | None
) -> ort.InferenceSession:
    """The session. Raises `ArtifactError` and `DeviceError`."""
    import onnxruntime as ort

    missing = "" if meter is None else preload_libraries()
    limit = None if meter is None else allocator_limit(meter)
    try:
        session = ort.InferenceSession(
            str(model),
            session_options(options.onnx, on_gpu=meter is not None),
            providers=with_options(providers, limit),
            # By default it answers what fails on a GPU, a load or any later run, by a new session
            # on the CPU and a line on standard output.
            enable_fallback=0,
        )
    except Exception as error:
        fault = meaning(error, "cpu" if meter is None else "cuda:0")
        if isinstance(fault, FatalDeviceError):
            raise fault from error
        if fault is not None and meter is not None:
            raise does_not_fit(model, meter, fault.requested_bytes) from error
        raise ArtifactError(f"{model}: ONNX Runtime cannot load it: {one_line(error)}") from error
    if meter is not None and session.get_providers()[0] != providers[0]:
        # ONNX Runtime only logs that a provider did not come up, and runs on the next.
        if options.device != "auto" or options.onnx.get("providers"):
            detail = f"{providers[0]} did not start" + (f" ({missing[:300]})" if missing else "")
            raise refused_by_runtime(asked_for(options), "ONNX Runtime", detail)
        _log.warning("a GPU is there but %s did not start: running on the CPU", providers[0])
    elif meter is not None:
        log_nodes_on_cpu(model, session)
        require_loaded_within_limit(model, meter)
    return session


def session_options(settings: Mapping[str, Any], *, on_gpu: bool = False) -> ort.SessionOptions:
    """What a replica gives its session; `settings` are the fields of `OnnxConfig`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = settings.get("intra_op_threads", 1)
    options.inter_op_num_threads = inter = settings.get("inter_op_threads", 1)
    if inter > 1:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = {
        "disabled": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[settings.get("graph_optimization", "all")]
    # Idle pool threads sleep instead of spinning: the gateway shares these cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # A shape's second run would take one block for all that the first took piece by piece, beside
    # these: more than a warm-up has measured.
    options.enable_mem_pattern = not on_gpu
    options.add_session_config_entry(RECORD_NODES, "1" if on_gpu else "0")
    # Weights are allocated at their size, not in the arena, which rounds up.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    return options


def _declared(session: ort.InferenceSession, model: Path) -> Signature:
    """What the graph says of its inputs and outputs; symbolic dimensions become -1."""

    def read(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
        specs = []
        for node in nodes:
            if node.type not in _ELEMENT_TYPES:
                raise ArtifactError(
                    f"{model}: {node.name!r} is a {node.type}: the protocol has no such datatype"
                )
            shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape)
            specs.append(TensorSpec(node.name, _ELEMENT_TYPES[node.type][0], shape))
        return tuple(specs)

    return Signature(read(session.get_inputs()), read(session.get_outputs()), Batch.NONE)


def _check(declared: Signature, signature: Signature, model: Path) -> None:
    for kind in ("inputs", "outputs"):
        ours = [(t.name, t.datatype) for t in getattr(signature, kind)]
        theirs = [(t.name, t.datatype) for t in getattr(declared, kind)]
        if ours != theirs:
            raise ArtifactError(f"{model}: its {kind} are {theirs}, its signature.json says {ours}")


def _converted(name: str, datatype: str, array: Array) -> Any:
    """What a session takes for `array`, which must outlive the run: an OrtValue borrows it."""
    import onnxruntime as ort

    if datatype == "BYTES":
        return _to_text(name, array)
    if datatype == "BF16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_TYPE["BF16"])
    return ort.OrtValue.ortvalue_from_numpy(array)


def _to_text(name: str, array: Array) -> Array:
    """BYTES elements as the `str` that ONNX Runtime wants: it would take `bytes` by their repr."""
    text = np.empty(array.size, dtype=object)
    for i, element in enumerate(array.reshape(-1)):
        try:
            text[i] = element.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"input {name!r}: element {i} is not valid UTF-8, and this model takes text"
            ) from None
    return text.reshape(array.shape)


def _from_text(array: Array) -> Array:
    raw = np.empty(array.size, dtype=object)
    raw[:] = [element.encode() for element in array.reshape(-1)]
    return raw.reshape(array.shape)


def _copy_out(value: Any, datatype: str) -> Array:
    """The content of an OrtValue on the host: `OrtValue.numpy` knows no BF16."""
    if datatype != "BF16":
        return as_raw(value.numpy())
    content = np.empty(value.shape(), DATATYPES["BF16"].numpy)
    ctypes.memmove(content.ctypes.data, value.data_ptr(), value.tensor_size_in_bytes())
    return content

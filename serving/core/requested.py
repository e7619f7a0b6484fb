"""Which outputs a request asks for, and in what form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from serving.core.classification import NOT_CLASSIFIABLE
from serving.core.inference import Limits, RequestedOutput
from serving.core.parameters import read_bool, read_integer, read_parameters, refuse_unknown
from serving.core.tensors import NO_JSON_FORM, show
from serving.core.types import Signature
from serving.errors import InvalidRequest

_MEMBERS: Final = frozenset({"name", "parameters"})
# Levels of JSON down to an output's parameters: the request, its outputs, the output, they.
_LEVELS_OF_PARAMETERS: Final = 4


class OutputSelector:
    """Reads the `outputs` of requests for one signature."""

    def __init__(self, signature: Signature, limits: Limits) -> None:
        self._specs = signature.outputs
        self._index_of = {spec.name: i for i, spec in enumerate(signature.outputs)}
        self._max_outputs = max(limits.max_tensors, len(signature.outputs))
        self._levels = limits.max_json_depth - _LEVELS_OF_PARAMETERS
        self._all_json = tuple(RequestedOutput(i) for i in range(len(self._specs)))
        self.all_binary = tuple(RequestedOutput(i, binary=True) for i in range(len(self._specs)))
        self._no_json = [spec for spec in self._specs if spec.datatype in NO_JSON_FORM]
        self.lacks_json = bool(self._no_json)

    def all(self, binary: bool) -> tuple[RequestedOutput, ...] | None:
        """Every output; None for all as JSON. Raises `InvalidRequest` if one has no such form."""
        if binary:
            return self.all_binary
        if self.lacks_json:
            raise _no_json_form(self._no_json[0].name, self._no_json[0].datatype)
        return None

    def select(self, raw: Any, binary: bool) -> tuple[RequestedOutput, ...] | None:
        """The outputs that a parsed `outputs` member asks for, in its order; None for all as JSON.

        `binary` is the request's `binary_data_output`. Raises `InvalidRequest` and `Unsupported`.
        """
        if raw is None or raw == []:
            return self.all(binary)
        if type(raw) is not list:
            raise InvalidRequest(f"outputs must be a list, found {show(raw)}")
        if len(raw) > self._max_outputs:
            raise InvalidRequest(f"outputs has {len(raw)} items, {self._max_outputs} are allowed")
        selected: dict[int, RequestedOutput] = {}
        for entry in raw:
            output = self._read(entry, binary)
            if output.index in selected:
                raise InvalidRequest(
                    f"output {self._specs[output.index].name!r} is requested more than once"
                )
            selected[output.index] = output
        return tuple(selected.values())

    def _read(self, entry: Any, binary: bool) -> RequestedOutput:
        if type(entry) is not dict:
            raise InvalidRequest(f"outputs must hold objects, found {show(entry)}")
        name = entry.get("name")
        index = self._index_of.get(name) if type(name) is str else None
        if index is None:
            raise InvalidRequest(
                f"the model has no output {show(name)}; it has {', '.join(self._index_of)}"
            )
        spec = self._specs[index]
        where = f"output {spec.name!r}"
        refuse_unknown(where, entry, _MEMBERS)
        parameters: Mapping[str, Any] = read_parameters(
            where, entry.get("parameters"), self._levels
        )
        binary = read_bool(where, parameters, "binary_data", binary)
        classes = read_integer(where, parameters, "classification")
        if classes:
            if spec.datatype in NOT_CLASSIFIABLE:
                raise InvalidRequest(
                    f"{where} has datatype {spec.datatype}, which classification cannot rank"
                )
            return RequestedOutput(index, binary, classes)
        if binary:
            return self.all_binary[index]
        if spec.datatype in NO_JSON_FORM:
            raise _no_json_form(spec.name, spec.datatype)
        return self._all_json[index]


def _no_json_form(name: str, datatype: str) -> InvalidRequest:
    return InvalidRequest(
        f"output {name!r} has datatype {datatype}, which has no JSON form; "
        "request it with binary_data"
    )

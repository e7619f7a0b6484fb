"""`serving infer`: one request over the binary wire, with the standard library only."""

from __future__ import annotations

import http.client
import json
import os
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

import typer

from serving.cli.infer_types import to_wire
from serving.cli.registry import open_registry, split
from serving.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

STDIN: Final = Path("-")
_HEADER: Final = "Inference-Header-Content-Length"
_LENGTH: Final = struct.Struct("<I")


def add_commands(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(infer)


def infer(
    model: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION.")],
    source: Annotated[
        Path,
        typer.Option(
            "--input", help="x.npz (arrays by input name), x.npy, x.json, or - for JSON on stdin."
        ),
    ],
    version: Annotated[
        str | None, typer.Option(help="A served version; default: the model's own.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Gateway; default: what runs on the home, else its configured port."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Configuration file that names the gateway.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 60.0,
) -> None:
    """Send one inference request and print the outputs as JSON."""
    from serving.cli.home import gateway_url

    name, version = _name_and_version(model, version, file)
    base = f"{gateway_url(url, file)}/v2/models/{quote(name, safe='')}"
    if version is not None:
        base += f"/versions/{quote(version, safe='')}"
    declared = _call(base, None, {}, timeout)[0]["inputs"]
    body, headers = _encode(*_read(source, declared))
    answer, tail = _call(f"{base}/infer", body, {**headers, **_credentials()}, timeout)
    typer.echo(json.dumps(_decode(answer, tail), indent=2))


def _credentials() -> dict[str, str]:
    """The header with the API key of the environment. Raises `ConfigError`."""
    key = os.environ.get("SERVING_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("SERVING_API_KEY has characters that no key can have; allowed: ASCII")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _name_and_version(model: str, version: str | None, file: Path | None) -> tuple[str, str | None]:
    """The name, and the version if one is asked for; the registry says what an alias names."""
    name, ref = split(model)
    if ref is None:
        return name, version
    if version is not None:
        raise ConfigError(f"{model!r} names a version already; leave out --version {version}")
    if ref.startswith("@"):
        return name, open_registry(file).get(name, ref).version
    return name, ref


def _read(
    source: Path, declared: list[dict[str, Any]]
) -> tuple[list[tuple[dict[str, Any], Array]], dict[str, Any]]:
    """(members but for its data, array) by input; and what else the request says.

    Only a file that is a whole request says more. Raises `ConfigError`.
    """
    where = Path("standard input") if source == STDIN else source  # for messages
    try:
        tensors, rest = _tensors(source, where, declared)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{where}: {error}") from error
    return [_checked(where, tensor, declared) for tensor in tensors], rest


def _tensors(
    source: Path, where: Path, declared: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The inputs, each with its name and data; and what else the request says."""
    import numpy as np

    if source == STDIN or source.suffix == ".json":
        parsed = json.loads(sys.stdin.read() if source == STDIN else source.read_text("utf-8"))
        if isinstance(parsed, dict) and isinstance(parsed.get("inputs"), list):
            return [_shaped(where, tensor) for tensor in parsed.pop("inputs")], parsed
        found = _from_json(where, parsed, declared)
    elif source.suffix == ".npz":
        with np.load(source, allow_pickle=False) as archive:
            found = {key: archive[key] for key in archive.files}
    elif source.suffix == ".npy":
        found = {_only(where, declared): np.load(source, allow_pickle=False)}
    else:
        raise ConfigError(f"{where}: expected a .npz, .npy or .json file, or - for stdin")
    return [{"name": name, "data": value} for name, value in found.items()], {}


def _shaped(source: Path, tensor: Any) -> dict[str, Any]:
    """An input of a request with its data in its shape."""
    import numpy as np

    try:
        shape = tensor["shape"]
        members = {k: v for k, v in tensor.items() if k != "shape"}
        return {**members, "name": tensor["name"], "data": np.reshape(tensor["data"], shape)}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{source}: each of its inputs must have name, shape and data") from error


def _checked(
    source: Path, tensor: dict[str, Any], declared: list[dict[str, Any]]
) -> tuple[dict[str, Any], Array]:
    """An input in the model's datatype. Raises `ConfigError`."""
    datatypes = {known["name"]: known["datatype"] for known in declared}
    name = tensor["name"]
    datatype = datatypes.get(name) if isinstance(name, str) else None
    if datatype is None:
        raise ConfigError(
            f"{source}: the model has no input {name}; its inputs: {', '.join(datatypes)}"
        )
    members = {"datatype": datatype, **{k: v for k, v in tensor.items() if k != "data"}}
    if members["datatype"] != datatype:
        raise ConfigError(
            f"{source}: input {name} has datatype {members['datatype']}; the model takes {datatype}"
        )
    return members, _to_wire(source, name, datatype, tensor["data"])


def _only(source: Path, declared: list[dict[str, Any]]) -> str:
    if len(declared) != 1:
        names = ", ".join(tensor["name"] for tensor in declared)
        raise ConfigError(f"{source}: the model has inputs {names}; use a .npz with these names")
    return str(declared[0]["name"])


def _from_json(source: Path, parsed: Any, declared: list[dict[str, Any]]) -> Mapping[str, Any]:
    """A mapping of input names to nested lists, or the nested list of the only input."""
    if isinstance(parsed, list):
        return {_only(source, declared): parsed}
    if isinstance(parsed, dict):
        return parsed
    raise ConfigError(f"{source}: expected a list, an object of inputs, or an inference request")


def _to_wire(source: Path, name: str, datatype: str, value: Any) -> Array:
    """The array in the wire's form. What that changes is said on standard error."""
    try:
        wire, said = to_wire(datatype, value, typed=source.suffix in (".npz", ".npy"))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: input {name} is not {datatype}: {error}") from error
    if said:
        typer.echo(f"{source}: input {name}: {said}", err=True)
    return wire


def _raw(datatype: str, array: Array) -> bytes:
    if datatype != "BYTES":
        return array.tobytes()
    parts = []
    for element in array.ravel():
        data = element if isinstance(element, bytes) else str(element).encode()
        parts += [_LENGTH.pack(len(data)), data]
    return b"".join(parts)


def _encode(
    inputs: list[tuple[dict[str, Any], Array]], rest: dict[str, Any]
) -> tuple[bytes, dict[str, str]]:
    raws = [_raw(members["datatype"], array) for members, array in inputs]
    tensors = [
        {
            **members,
            "shape": list(array.shape),
            "parameters": {**_object(members, "parameters"), "binary_data_size": len(raw)},
        }
        for (members, array), raw in zip(inputs, raws, strict=True)
    ]
    parameters = {"binary_data_output": True, **_object(rest, "parameters")}
    head = json.dumps({**rest, "inputs": tensors, "parameters": parameters}).encode()
    headers = {_HEADER: str(len(head)), "Content-Type": "application/octet-stream"}
    return b"".join([head, *raws]), headers


def _object(members: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An optional member that is an object. Raises `ConfigError`."""
    value = members.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{key} of the request must be an object")
    return value or {}


def _call(
    url: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
) -> tuple[dict[str, Any], bytes]:
    """The JSON of a reply, and the bytes after it. Raises `ClusterError`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(
            urllib.request.Request(url, data=body, headers=dict(headers)), timeout=timeout_s
        ) as reply:
            content = reply.read()
            length = int(reply.headers.get(_HEADER) or len(content))
            return json.loads(content[:length]), content[length:]
    except urllib.error.HTTPError as error:
        raise ClusterError(_refusal(error)) from error
    except http.client.HTTPException as error:
        raise ClusterError(f"what listens at {url} does not speak HTTP") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ClusterError(
            f"no gateway answers at {url} ({reason}); start one with `serving up`, or name it with "
            "--url, -f or SERVING_URL"
        ) from error


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        return f"HTTP {error.code}: {json.load(error)['error']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code} from {error.url}"


def _decode(answer: dict[str, Any], tail: bytes) -> dict[str, Any]:
    """The answer with every output's data as nested lists."""
    at = 0
    for tensor in answer["outputs"]:
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        if size is None:
            continue
        tensor["data"] = _values(tensor["datatype"], tensor["shape"], tail[at : at + size])
        at += size
        del tensor["parameters"]["binary_data_size"]
        if not tensor["parameters"]:
            del tensor["parameters"]
    return answer


def _values(datatype: str, shape: list[int], raw: bytes) -> Any:
    import numpy as np

    from serving.core.types import DATATYPES

    if datatype == "BYTES":
        elements, at = [], 0
        while at < len(raw):
            (length,) = _LENGTH.unpack_from(raw, at)
            at += _LENGTH.size
            elements.append(raw[at : at + length].decode("utf-8", "backslashreplace"))
            at += length
        return np.array(elements, dtype=object).reshape(shape).tolist()
    flat = np.frombuffer(raw, dtype=DATATYPES[datatype].numpy)
    if datatype == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.reshape(shape).tolist()

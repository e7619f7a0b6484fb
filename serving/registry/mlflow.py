"""The model registry, on MLflow: control plane only, never on the way of a request.

A bundle (see serving/artifacts.py) is stored as an MLflow logged model with its run, metrics and
data set, and becomes visible as a model version last, when all of it is in place. MLflow keeps no
digest of what it stores: the version's tags carry ours, and whoever fetches a version checks it.

Tags of a version: `digest`, `model_id`, `platform`, `signature` (JSON), and `dataset` (JSON),
because MLflow cuts a data set's digest at 36 characters. The training time is the run's end minus
its start.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from serving import artifacts
from serving.core.types import Signature
from serving.errors import RegistryError, ServingError
from serving.registry.model import (
    Dataset,
    ModelVersion,
    RegisteredModel,
    check_alias,
    check_metrics,
    check_name,
)
from serving.registry.reason import sentence

log = logging.getLogger(__name__)

_OWN_TAGS: Final = frozenset({"digest", "model_id", "platform", "signature", "dataset"})
# What MLflow's stores answer for a name, a version or an alias that they do not have.
_ABSENT: Final = frozenset({"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"})
_DATASET_DIGEST_LIMIT: Final = 36
_PAGE: Final = 1000


class Registry:
    """Models in the MLflow registry at `uri`: `sqlite:////…`, another SQL URL, or `http(s)://…`.

    `artifact_root` is the directory for artifacts; by default one beside an SQLite file, and the
    server's own choice otherwise. MLflow is imported and connected at the first call (seconds, and
    more where it creates a fresh SQLite file). Every method may raise `RegistryError`.
    """

    def __init__(self, uri: str, artifact_root: Path | None = None) -> None:
        self.uri = uri
        self._artifact_root = artifact_root or _beside_sqlite(uri)

    def register(
        self,
        name: str,
        bundle: Path,
        *,
        metrics: Mapping[str, float] | None = None,
        dataset: Dataset | tuple[str, str, str] | None = None,
        training_time: tuple[int, int] | None = None,
        alias: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> ModelVersion:
        """Store a bundle as the next version of `name`, and set `alias` on it.

        MANIFEST.json is written into `bundle` if it is not there. `training_time` is (start, end)
        in Unix milliseconds. If this is interrupted before its end, there is no such version.

        Raises `ArtifactError` if the bundle is not whole, `RegistryError` for anything else.
        """
        check_name(name)
        if alias is not None:
            check_alias(alias)
        measured = check_metrics(metrics or {})
        data = None if dataset is None else Dataset(*dataset)
        version_tags = _version_tags(tags or {}, bundle, data)
        # Not known: a run of no length.
        start_ms, end_ms = training_time or (now := time.time_ns() // 1_000_000, now)
        if end_ms < start_ms:
            raise RegistryError(f"training time ends ({end_ms}) before it starts ({start_ms})")
        with self._errors(f"register {name}"):
            run_id = self._start_run(name, start_ms, data)
            try:
                logged = self._log_model(name, run_id, bundle, measured, data)
                self._client.set_terminated(run_id, end_time=end_ms)
            except BaseException:
                self._abandon(run_id)
                raise
            self._ensure_model(name)
            created = self._client.create_model_version(
                name,
                source=logged.artifact_location,
                run_id=run_id,
                model_id=logged.model_id,
                tags={**version_tags, "model_id": logged.model_id},
                await_creation_for=0,
            )
            if alias is not None:
                self._client.set_registered_model_alias(name, alias, str(created.version))
        return self.get(name, str(created.version))

    def models(self) -> list[RegisteredModel]:
        """Every model with all its versions, by name. Reads one run per version."""
        with self._errors("list models"):
            search = self._client.search_registered_models
            found = list(_pages(lambda token: search(max_results=_PAGE, page_token=token)))
            return [self._model(row) for row in sorted(found, key=lambda row: str(row.name))]

    def model(self, name: str) -> RegisteredModel:
        """One model with all its versions. The error for an unknown name lists the known ones."""
        with self._errors(f"read {name}"):
            try:
                found = self._client.get_registered_model(name)
            except Exception as error:
                if _code(error) not in _ABSENT:
                    raise
                raise self._missing(name, "") from error
            return self._model(found)

    def get(self, name: str, ref: str) -> ModelVersion:
        """The version that `ref`, a number or an @alias, names now.

        The error for an unknown model, version or alias lists what there is.
        """
        with self._errors(f"read {name}"):
            try:
                if ref.startswith("@"):
                    found = self._client.get_model_version_by_alias(name, ref[1:])
                else:
                    found = self._client.get_model_version(name, ref)
            except Exception as error:
                if _code(error) not in _ABSENT:
                    raise
                raise self._missing(name, ref) from error
            return self._version(found, tuple(found.aliases))

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Let `@alias` name `version`, whatever it named before."""
        check_alias(alias)
        version = self.get(name, version).version
        with self._errors(f"set @{alias} of {name}"):
            self._client.set_registered_model_alias(name, alias, version)

    def fetch(self, source: str, directory: Path) -> None:
        """Copy what lies at a version's `source` into an empty directory, which exists.

        The caller verifies what arrived.
        """
        with self._errors(f"fetch {source}"):
            _prepare_mlflow()
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            repository = get_artifact_repository(
                source, tracking_uri=self.uri, registry_uri=self.uri
            )
            repository.download_artifacts("", dst_path=str(directory))

    # MLflow's side.

    @cached_property
    def _client(self) -> Any:
        _prepare_mlflow()
        from mlflow import MlflowClient

        if not self.uri.startswith(("http://", "https://")):
            import mlflow.store.db.utils

            # It would try again for 100 s, also where the file is not a database.
            mlflow.store.db.utils.MAX_RETRY_COUNT = 1
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def _start_run(self, name: str, start_ms: int, data: Dataset | None) -> str:
        run = self._client.create_run(self._experiment(name), start_time=start_ms, run_name=name)
        run_id = str(run.info.run_id)
        if data is not None:
            from mlflow.entities import Dataset as MlflowDataset
            from mlflow.entities import DatasetInput

            row = MlflowDataset(
                name=data.name,
                digest=data.digest[:_DATASET_DIGEST_LIMIT],
                source_type="uri",
                source=data.uri,
            )
            self._client.log_inputs(run_id, [DatasetInput(row)])
        return run_id

    def _experiment(self, name: str) -> str:
        """The experiment that holds a model's runs, made at its first registration."""
        title = f"serving/{name}"
        found = self._client.get_experiment_by_name(title)
        if found is None:
            root = self._artifact_root
            location = None if root is None else (root.absolute() / name).as_uri()
            try:
                return str(self._client.create_experiment(title, artifact_location=location))
            except Exception as error:
                if _code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(title)
        return str(found.experiment_id)

    def _log_model(
        self,
        name: str,
        run_id: str,
        bundle: Path,
        metrics: Mapping[str, float],
        data: Dataset | None,
    ) -> Any:
        experiment = self._client.get_run(run_id).info.experiment_id
        # MLflow allows a dot in a registered model's name, and not in a logged model's.
        title = name.replace(".", "_")
        logged = self._client.create_logged_model(experiment, name=title, source_run_id=run_id)
        self._client.log_model_artifacts(logged.model_id, str(bundle))
        for key, value in metrics.items():
            self._client.log_metric(
                run_id,
                key,
                value,
                model_id=logged.model_id,
                dataset_name=data.name if data else None,
                dataset_digest=data.digest[:_DATASET_DIGEST_LIMIT] if data else None,
            )
        location = urlsplit(logged.artifact_location)
        if location.scheme == "file":
            artifacts.make_durable(Path(unquote(location.path)))
        self._client.finalize_logged_model(logged.model_id, "READY")
        return logged

    def _abandon(self, run_id: str) -> None:
        try:
            self._client.set_terminated(run_id, status="FAILED")
        except Exception:
            # The error that brought us here is the one to report.
            log.debug("run %s could not be marked as failed", run_id, exc_info=True)

    def _ensure_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except Exception as error:
            if _code(error) != "RESOURCE_ALREADY_EXISTS":
                raise

    def _missing(self, name: str, ref: str) -> RegistryError:
        models = {model.name: model for model in self.models()}
        if name not in models:
            known = ", ".join(models) or "none"
            return RegistryError(
                f"no model {name!r} in the registry {self._shown}; models: {known}"
            )
        versions = ", ".join(v.version for v in models[name].versions) or "none"
        aliases = models[name].aliases
        named = ", ".join(f"@{a} (version {v})" for a, v in sorted(aliases.items())) or "none"
        what = f"alias {ref}" if ref.startswith("@") else f"version {ref!r}"
        return RegistryError(
            f"model {name!r} has no {what}; versions: {versions}; aliases: {named}"
        )

    def _model(self, row: Any) -> RegisteredModel:
        aliases = {str(alias): str(version) for alias, version in row.aliases.items()}
        quote = '"' if "'" in row.name else "'"
        search, filtered = self._client.search_model_versions, f"name = {quote}{row.name}{quote}"
        found = _pages(lambda token: search(filtered, max_results=_PAGE, page_token=token))
        versions = [
            self._version(v, tuple(a for a, n in aliases.items() if n == str(v.version)))
            for v in sorted(found, key=lambda v: int(v.version))
        ]
        return RegisteredModel(str(row.name), tuple(versions), aliases)

    def _version(self, row: Any, aliases: tuple[str, ...]) -> ModelVersion:
        # Another client may use the same names for other things.
        tags = row.tags if {"digest", "signature"} <= row.tags.keys() else {}
        metrics, training_time_s = self._run_facts(row.run_id)
        signature = tags.get("signature")
        return ModelVersion(
            name=row.name,
            version=str(row.version),
            digest=tags.get("digest", ""),
            source=row.source,
            aliases=tuple(sorted(aliases)),
            metrics=metrics,
            dataset=Dataset(*json.loads(tags["dataset"])) if "dataset" in tags else None,
            training_time_s=training_time_s,
            created_at=datetime.fromtimestamp(row.creation_timestamp / 1000, UTC),
            platform=tags.get("platform", ""),
            signature=Signature.from_dict(json.loads(signature)) if signature else None,
        )

    def _run_facts(self, run_id: str | None) -> tuple[Mapping[str, float], float | None]:
        """Metrics and training time; a version need not have a run, nor the run still be there."""
        if not run_id:
            return {}, None
        try:
            run = self._client.get_run(run_id)
        except Exception as error:
            if _code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}, None
        info = run.info
        length_ms = info.end_time - info.start_time if info.end_time else 0
        return dict(run.data.metrics), length_ms / 1000 or None

    @property
    def _shown(self) -> str:
        """The URI without a password."""
        return self._hide_password(self.uri)

    def _hide_password(self, text: str) -> str:
        password = urlsplit(self.uri).password
        return text.replace(f":{password}@", ":***@") if password else text

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """MLflow raises its own errors and those of all that is under it: make them a sentence."""
        try:
            yield
        except ServingError:
            raise
        except Exception as error:
            reason = self._hide_password(sentence(error))
            raise RegistryError(f"registry {self._shown}: cannot {doing}: {reason}") from error


def _prepare_mlflow() -> None:
    """What MLflow reads at its import, and what it would log."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # An operator waits: its own 7 retries of 120 s each say no more than these.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    for name, level in (
        ("mlflow", logging.WARNING),
        # It logs tracebacks of errors that it also raises.
        ("mlflow.store", logging.CRITICAL),
        ("alembic", logging.WARNING),
    ):
        logging.getLogger(name).setLevel(level)


def _code(error: Exception) -> str:
    """An MLflow exception's code, as "RESOURCE_DOES_NOT_EXIST"; empty for any other error."""
    return str(getattr(error, "error_code", ""))


def _pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(token)
        yield from page
        if not (token := page.token):
            return


def _version_tags(tags: Mapping[str, str], bundle: Path, dataset: Dataset | None) -> dict[str, str]:
    """The tags of a version but for `model_id`. Raises `ArtifactError` or `RegistryError`."""
    if own := _OWN_TAGS & tags.keys():
        raise RegistryError(f"tag {min(own)!r} is reserved")
    manifest = artifacts.build_manifest(bundle)
    if (bundle / artifacts.MANIFEST_FILE).exists():
        artifacts.verify(bundle, artifacts.read_manifest(bundle).digest)
    else:
        artifacts.write_manifest(bundle, manifest)
    info = artifacts.read_signature(bundle)
    own_tags = {
        "digest": manifest.digest,
        "platform": info.platform,
        "signature": json.dumps(info.signature.to_dict(), separators=(",", ":")),
    }
    if dataset is not None:
        own_tags["dataset"] = json.dumps(dataset)
    return {**tags, **own_tags}


def _beside_sqlite(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix) + ".artifacts") if uri.startswith(prefix) else None

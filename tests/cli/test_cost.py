"""`serving cost` against a running deployment, and what it refuses."""

from __future__ import annotations

import csv
import json

import pytest

from tests.e2e.deployment import Deployment, eventually, serving

pytestmark = [pytest.mark.cluster]


def test_forms_of_output(deployment: Deployment) -> None:
    def known() -> bool:
        return bool(deployment.get(deployment.control_port, "/v1/cost")["groups"])

    eventually(known, "the replica is charged")
    table = serving("cost", "--since", "1h", home=deployment.home)
    assert table.returncode == 0, table.stderr
    assert "$/1000 loaded" in table.stdout
    assert "mlp" in table.stdout
    found = json.loads(serving("cost", "--by", "kind", "--json", home=deployment.home).stdout)
    assert {"idle", "warmup"} <= {group["kind"] for group in found["groups"]}
    text = serving("cost", "--by", "model,gpu", "--csv", home=deployment.home).stdout
    [line] = csv.DictReader(text.splitlines())
    assert (line["model"], line["gpu"]) == ("mlp", "cpu")
    assert float(line["usd"]) > float(line["usd_warmup"]) > 0
    assert line["energy_wh_estimate"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--since", "yesterday"], "allowed: a time such as 30m, 24h or 7d, or all"),
        (["--by", "colour"], "model, version, tenant, gpu, kind; not 'colour'"),
        (["--by", "model,model"], "each once"),
        (["--json", "--csv"], "choose one"),
    ],
)
def test_what_is_refused(deployment: Deployment, arguments: list[str], message: str) -> None:
    done = serving("cost", *arguments, home=deployment.home)
    assert done.returncode != 0
    assert message in done.stderr
    assert done.stderr.count("\n") == 1

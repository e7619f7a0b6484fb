"""Keeps one agent running on every node for which Ray counts GPUs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final

import ray
from ray import serve

from serving.control.cluster import NODE_LABEL, RAY_ERRORS, replica_options
from serving.errors import ClusterError, first_line

AGENT_APP: Final = "agent"


class NodeAgents:
    """The agents' application on the Serve instance that this process belongs to.

    `agent_class` is the dotted path "module:Class" of what it runs; `env` is set in each agent.
    """

    def __init__(self, agent_class: str, env: Mapping[str, str]) -> None:
        self._agent_class = agent_class
        self._env = dict(env)
        self._nodes: tuple[str, ...] = ()

    def __call__(self) -> dict[str, float]:
        """Start or stop agents where nodes came or went; what Ray counts of GPUs, by node.

        Does not wait for the agents. Raises `ClusterError`.
        """
        try:
            counts = _nodes_with_gpus()
            nodes = tuple(sorted(counts))
            if nodes != self._nodes:
                self._deploy(nodes)
                self._nodes = nodes
        except RAY_ERRORS as error:
            raise ClusterError(f"cannot start node agents: {first_line(error)}") from error
        return counts

    def _deploy(self, nodes: tuple[str, ...]) -> None:
        if not nodes:
            serve.delete(AGENT_APP, _blocking=False)
            return
        module, _, name = self._agent_class.partition(":")
        options = replica_options(self._env, {})
        # It takes no GPU from Ray, so only the label brings it to where one is.
        options["ray_actor_options"]["label_selector"] = {NODE_LABEL: f"in({','.join(nodes)})"}
        agent: Any = getattr(importlib.import_module(module), name)
        bound = agent.options(**options, num_replicas=len(nodes), max_replicas_per_node=1).bind()
        serve.run_many(
            [serve.RunTarget(bound, name=AGENT_APP, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


def _nodes_with_gpus() -> dict[str, float]:
    return {
        str(node["NodeID"]): float(node["Resources"]["GPU"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU", 0) > 0
    }

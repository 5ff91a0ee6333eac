"""Several Ray nodes on one machine: fake GPUs, tier labels, simulated card sizes. Run as a process of its own:

    python -m tests.cluster CONFIG NAME=TIER:GIB ...

and told on standard input: `remove NAME`, `add NAME`, `drain NAME SECONDS`, `deploy CONFIG`; end of input ends everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acestep.ray_env import ALONE
from tests.server import ROOT, START_TIMEOUT_S, Server, starting

RAY = str(Path(sys.executable).with_name("ray"))


class Cluster(Server):
    """A head without a card, and one node per given card; the Serve config runs on all of them.

    Args:
        cards: (name, tier, GiB) of each node.
        config: A whole Serve config; its port is replaced.
    """

    def __init__(
        self, cards: Sequence[tuple[str, str, float]], config: dict[str, Any], env: dict[str, str] | None = None
    ):
        def edit(data: dict[str, Any]) -> None:
            port = data["http_options"]["port"]
            data.clear()
            data.update(config)
            data["http_options"] = {"host": "127.0.0.1", "port": port}
            data["proxy_location"] = "HeadOnly"

        super().__init__(edit=edit, env=env)
        self.env = {k: v for k, v in self.env.items() if k not in ALONE}
        self.cards = cards

    def start(self, ready: bool = True) -> Cluster:
        self.make_token()
        specs = [f"{name}={tier}:{gib:g}" for name, tier, gib in self.cards]
        with starting(), self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.cluster", str(self.config), *specs], cwd=ROOT, env=self.env,
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            self.wait_for("/readyz" if ready else "/livez", timeout_s=START_TIMEOUT_S)
        return self

    def tell(self, order: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(order.encode() + b"\n")
        self.process.stdin.flush()

    def interrupt(self, timeout_s: float = 120.0) -> float:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout_s)
        return 0.0


def main(config_path: str, *specs: str) -> None:
    import ray
    import yaml
    from ray import serve
    from ray.cluster_utils import Cluster as RayCluster
    from ray.serve.schema import ServeDeploySchema

    cards = {}
    for spec in specs:
        name, _, rest = spec.partition("=")
        tier, _, gib = rest.partition(":")
        cards[name] = (tier, gib)

    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": 0})

    def add(name: str) -> Any:
        tier, gib = cards[name]
        os.environ["MAX_CUDA_VRAM"] = gib  # nodes inherit the environment they are started in
        try:
            return cluster.add_node(
                num_cpus=2, num_gpus=1, labels={"acestep/role": "gpu", "acestep/gpu-tier": tier}, wait=True
            )
        finally:
            del os.environ["MAX_CUDA_VRAM"]

    nodes = {name: add(name) for name in cards}
    ray.init(address=cluster.address, namespace="serve", log_to_driver=True)
    config = ServeDeploySchema.model_validate(yaml.safe_load(Path(config_path).read_text()))
    client = serve._private.api.serve_start(
        http_options=config.http_options.model_dump(), proxy_location=config.proxy_location,
        controller_options=config.controller_options,
    )  # fmt: skip
    client.deploy_apps(config, _blocking=False)
    for line in sys.stdin:
        order, _, name = line.strip().partition(" ")
        if order == "remove":
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
        elif order == "add":
            nodes[name] = add(name)
        elif order == "drain":
            name, _, seconds = name.partition(" ")
            told = [RAY, "drain-node", "--address", cluster.address, "--node-id", nodes[name].node_id]
            why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "its time is up"]
            subprocess.run([*told, *why, "--deadline-remaining-seconds", seconds], check=True)
        elif order == "deploy":
            client.deploy_apps(
                ServeDeploySchema.model_validate(yaml.safe_load(Path(name).read_text())), _blocking=False
            )
        print(f"told: {line.strip()}", flush=True)
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The fleet as a RayService on Kubernetes: rendering, checking and running the manifests in `k8s/`.

Everything but `cluster.py` and the commands that need a cluster works offline and without the `kubernetes` package.
"""

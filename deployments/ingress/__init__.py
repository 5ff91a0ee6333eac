"""HTTP in front: the Serve ingress and its three APIs."""

"""The fleet as a RayService on Kubernetes: rendering, checking and scaling the manifests in `k8s/`, and what runs in their pods."""

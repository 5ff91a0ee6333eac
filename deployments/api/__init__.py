"""The HTTP front: one file per API, mounted by `build_app`."""

"""Durable song jobs: the store, its leases, recovery and retention."""

"""Logs, traces, metrics."""

SECONDS = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000]  # buckets of histograms

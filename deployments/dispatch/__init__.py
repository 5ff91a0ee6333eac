"""Carries one job through its stages."""

"""Tiers for cached blocks below a pool's memory, each behind `ports.Store`."""

"""Whom to stop when memory is short. One file a policy: `Config`, and `Policy` as `engine.policies.Preemption`."""

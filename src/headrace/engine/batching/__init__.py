"""What goes into the next step. One file a policy: `Config`, and `Policy` as `engine.policies.Batching`."""

"""Where a sequence is prefilled and decoded. One file a policy: `Config`, and `Policy` as `cluster.policies.PlacementPolicy`."""

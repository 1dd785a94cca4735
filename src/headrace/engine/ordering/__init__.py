"""Who is looked at first. One file a policy: `Config`, and `Policy` as `engine.policies.Ordering`."""

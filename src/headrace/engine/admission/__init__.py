"""May a sequence start now? One file a policy: `Config`, and `Policy` as `engine.policies.Admission`."""

"""Which cached block goes first. One file a policy: `Config`, and `Policy.rank(entry)`; the lowest rank is evicted first."""

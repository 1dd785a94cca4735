"""Which running sequence moves where. One file a policy."""

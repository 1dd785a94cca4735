"""How many instances of which role, on which hardware. One file a policy."""

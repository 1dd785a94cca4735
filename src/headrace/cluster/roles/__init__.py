"""Which instances lean to prefill or decode now. One file a policy."""

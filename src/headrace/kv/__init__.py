"""L2, KV memory: free segments, prefix trees, pools and eviction. No bytes live here, only block ids."""

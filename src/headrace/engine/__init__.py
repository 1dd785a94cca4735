"""L2, one instance's scheduler: sequences, its share of a pool, and the plan of the next step."""

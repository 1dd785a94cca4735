"""The parts that models are composed of. Each is row-wise: what a token's row becomes depends on that row and its KV alone."""

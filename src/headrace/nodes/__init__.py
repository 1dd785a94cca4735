"""L3, the cores: instance, pool and router as state machines without I/O. They compose L2 and hold no policy of their own."""

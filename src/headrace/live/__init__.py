"""L4, the live shell: asyncio, ZeroMQ, shared memory, local processes. Hands the cores their events and carries out their commands."""

"""How workers are started and ended. One file a launcher."""

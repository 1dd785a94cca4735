"""L6, the command line: the one place where names become objects."""

"""L0, the vocabulary: frozen structs that are the same in the cores, on the wire and in the journal."""

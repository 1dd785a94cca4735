"""L4, load: the client behind `headrace bench` and its reports."""

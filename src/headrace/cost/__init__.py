"""L2, what work costs: model arithmetic, hardware, and the models that put both together as `types.costs.Costs`."""

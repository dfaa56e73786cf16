"""The parts of the DALI pipeline: what is read on the host, the graph, its colour operations."""

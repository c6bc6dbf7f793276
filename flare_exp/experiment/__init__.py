"""One run from its configuration to its folder: the stages in their order, provenance and results."""

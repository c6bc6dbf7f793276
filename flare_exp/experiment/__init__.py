"""Take one run from its configuration to its folder: stages, provenance and results."""

"""The options of a run: schema, composition by Hydra, and the check of a command line. Nothing is loaded or run here."""

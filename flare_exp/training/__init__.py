"""LightningModules and what a training needs around them: checkpoints, curves, progress, several processes."""

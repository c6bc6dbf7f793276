"""LightningModules, and the callbacks, trackers and process groups that a training needs."""

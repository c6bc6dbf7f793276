"""Find out what a run would build, need and take, without running it."""

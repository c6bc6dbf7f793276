"""What a run would build, need and take, found out without running it."""

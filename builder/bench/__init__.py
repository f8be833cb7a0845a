"""How fast, how much, and is it in order: timings, what a job will cost, and the check of a machine."""

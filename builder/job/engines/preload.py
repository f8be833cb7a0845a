"""What a fork server loads before it forks the first worker. Imported there and nowhere else."""

from contextlib import suppress

with suppress(Exception):  # whatever it is, each worker meets it again, and can tell the run's log
    import builder.job.worker  # noqa: F401

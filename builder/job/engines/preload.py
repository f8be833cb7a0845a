"""What a fork server loads before it forks the first worker. Imported there and nowhere else: it sets signal handlers.

A terminal and SLURM send their signals to every process of a job, so to the server, too. It has to outlive them:
workers finish what they have in hand, and only the server hears how they end. It leaves with the last that it serves.
"""

import signal
from contextlib import suppress

for interrupt in (signal.SIGINT, signal.SIGTERM):
    signal.signal(interrupt, signal.SIG_IGN)  # before the seconds that loading takes

with suppress(Exception):  # whatever it is, each worker meets it again, and can tell the run's log
    import builder.job.worker  # noqa: F401

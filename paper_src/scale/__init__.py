"""Many processes, models larger than memory, sweeps on a cluster."""

"""Whether a run is healthy: guard, spikes, stragglers, probe, heartbeat."""

"""Reads the schedule that libtpu gives a Pallas kernel, for a chip that need not be at hand."""

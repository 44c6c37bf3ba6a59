"""Times on this machine's device: what is timed, how, and where the results go."""

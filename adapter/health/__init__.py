"""Is the job alive and are its ranks alike: watchdog, heartbeat between hosts, desync check, self-test."""

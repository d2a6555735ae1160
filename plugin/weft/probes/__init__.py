"""What the ways between hosts carry: probes over the real tunnels, and what all hosts measured, put together."""

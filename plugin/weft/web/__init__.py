"""The opt-in listener: metrics for Prometheus, health for orchestrators, and the page for people."""

"""weft: multi-host networks for plain Docker Engines, without Swarm."""

__version__ = "0.1.0"

"""Many hosts on one machine: Docker Engines in namespaces, joined by a switch. See lab/lab.py."""

from lab.host import Host
from lab.lab import Lab
from lab.process import CommandFailed, LabError

__all__ = ["CommandFailed", "Host", "Lab", "LabError"]

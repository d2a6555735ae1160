"""The Docker Engine of this host beside the driver's calls: what it has, is to have, and has no more."""

"""Names of containers, for containers: the resolver, what it knows, and the way to it."""

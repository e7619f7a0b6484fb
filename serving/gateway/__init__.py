"""The HTTP data plane: protocol class, batcher, links to replicas."""

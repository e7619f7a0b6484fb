"""The controller: desired state, route table, metrics."""

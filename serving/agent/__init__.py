"""The node agent: what NVML says of a node's GPUs, told to the controller."""

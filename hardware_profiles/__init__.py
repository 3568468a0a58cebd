"""What a machine and the software on it are: devices, nodes, clusters, stacks. Data, no behaviour."""

"""What a machine and its software are: devices, nodes, clusters, stacks. Data, no behaviour."""

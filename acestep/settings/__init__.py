"""What is chosen for a machine, and why: options, planner, renderer, one resolver."""

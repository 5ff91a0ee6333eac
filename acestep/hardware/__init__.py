"""What is here: cards, devices, host."""

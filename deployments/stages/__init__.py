"""What runs on cards; called by handle only."""
